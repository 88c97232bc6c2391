"use strict";
(() => {
  const table = document.getElementById("functions");
  const sections = [...document.querySelectorAll("details.function")];
  const openTarget = () => {
    const wanted = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (wanted && wanted.matches("details.function")) {
      wanted.open = true;
      wanted.scrollIntoView();
    }
  };
  addEventListener("hashchange", openTarget);
  openTarget();
  if (!table) return;
  table.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.hash === location.hash) openTarget();
  });
  const body = table.tBodies[0];
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  const natural = new Intl.Collator("en", { numeric: true });
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    head.firstElementChild.addEventListener("click", () => {
      const numbers = head.classList.contains("n");
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numbers;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const order = numbers ? value(a, i) - value(b, i) : natural.compare(value(a, i), value(b, i));
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
  document.getElementById("filter").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    for (const row of body.rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      document.getElementById(row.dataset.id).hidden = row.hidden;
    }
  });
  const all = (open) => () => { for (const section of sections) section.open = open; };
  document.getElementById("open-all").addEventListener("click", all(true));
  document.getElementById("close-all").addEventListener("click", all(false));
})();
