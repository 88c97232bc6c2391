"""Checkers that look at compiled device code on machines that have no such device. They take bytes or text
and return data.
"""
