// The page's elements, and how figures are written.

/** The element with that id; index.html has it, or this throws. */
export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element ${id}`);
  return found as T;
}

export const button = (id: string) => element<HTMLButtonElement>(id);
export const input = (id: string) => element<HTMLInputElement>(id);

/** Show what is true, hide the rest. */
export function show(shown: Record<string, boolean>): void {
  for (const [id, visible] of Object.entries(shown)) element(id).hidden = !visible;
}

export function write(texts: Record<string, string>): void {
  for (const [id, text] of Object.entries(texts)) if (element(id).textContent !== text) element(id).textContent = text;
}

/** Three digits that mean something: 0.123, 12.3, 1,234. */
export function figure(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export const megabytes = (bytes: number) => `${figure(bytes / 1e6)} MB`;

/** With a capital, unless it begins with a file's name, and a full stop. */
export function sentence(text: string): string {
  const whole = /^[^\s]*[/_.]/.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

/** A button that copies what `text` gives, and says so for a moment. */
export function copies(id: string, text: () => string): void {
  const copy = button(id);
  const label = copy.textContent;
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Copying is not allowed here";
    }
    setTimeout(() => (copy.textContent = label), 1500);
  });
}
