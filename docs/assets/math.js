// Render the formulas that pymdownx.arithmatex marks: \( ... \) inline, \[ ... \] displayed.
// document$ comes from the theme: it emits when a page is loaded.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex:not([data-rendered])")) {
    const source = element.textContent.trim();
    katex.render(source.slice(2, -2), element, { displayMode: source.startsWith("\\["), throwOnError: false });
    element.dataset.rendered = "";
  }
});
