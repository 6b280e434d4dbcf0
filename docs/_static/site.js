// What scrolls sideways can be reached by the keyboard.
addEventListener("load", () => {
  const reach = () => document.querySelectorAll("pre, nav.pipeline, .table-wrapper, .cell_output > .output, mjx-container[display=true]").forEach((e) => {
    if (e.scrollWidth > e.clientWidth + 1) e.tabIndex = 0;
    else e.removeAttribute("tabindex");
  });
  reach();
  addEventListener("resize", reach);
});
