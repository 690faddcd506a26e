// Tables that scroll sideways can be reached, and scrolled, by the keyboard.
document$.subscribe(() =>
  setTimeout(() => document.querySelectorAll(".md-typeset__scrollwrap").forEach((wrap) => (wrap.tabIndex = 0)))
);
