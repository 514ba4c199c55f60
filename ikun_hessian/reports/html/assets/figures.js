"use strict";
// Shows the numbers of the point that is nearest to the pointer, and unfolds everything before printing.
const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x + 14), window.innerWidth - box.width - 8);
  const above = y - box.height - 14;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : y + 18) + "px";
}

function hideTip() {
  tip.hidden = true;
}

for (const chart of document.querySelectorAll("svg.chart")) {
  const points = [...chart.querySelectorAll("[data-tip]")];
  let near = null;
  const leave = () => {
    if (near) near.classList.remove("near");
    near = null;
    hideTip();
  };
  const move = (event) => {
    let best = null, least = 30 * 30;
    for (const point of points) {
      const box = point.getBoundingClientRect();
      const dx = box.left + box.width / 2 - event.clientX, dy = box.top + box.height / 2 - event.clientY;
      const distance = dx * dx + dy * dy;
      if (distance < least) { least = distance; best = point; }
    }
    if (near && near !== best) near.classList.remove("near");
    near = best;
    if (!best) return hideTip();
    best.classList.add("near");
    const box = best.getBoundingClientRect();
    showTip(best.dataset.tip, box.left + box.width / 2, box.top);
  };
  chart.addEventListener("pointermove", move);
  chart.addEventListener("pointerdown", move);
  chart.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  document.addEventListener("pointerdown", (event) => { if (!chart.contains(event.target)) leave(); });
  document.addEventListener("scroll", leave, { passive: true });
}

let unfolded = [];
window.addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  for (const part of unfolded) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of unfolded) part.open = false;
});
