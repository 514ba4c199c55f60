// Draws loss surfaces that can be turned, one canvas for each network, all on one scale of heights and colours.
(() => {
  const place = document.querySelector("[data-surfaces]");
  if (!place) return;
  const all = JSON.parse(document.getElementById("surfaces").textContent);
  const STOPS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
  const WIDTH = 340, HEIGHT = 290;
  const view = { turn: 35, tilt: 30, log: false, plane: all[0].plane, kind: all[0].kind };

  const make = (name, attributes, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const chooser = (key, label, values) => {
    const select = make("select", {}, ...values.map((value) => new Option(value, value)));
    select.addEventListener("change", () => { view[key] = select.value; rebuild(); });
    return make("label", {}, label, select);
  };
  const slider = (key, label, low, high) => {
    const input = make("input", { type: "range", min: low, max: high, value: view[key] });
    input.addEventListener("input", () => { view[key] = Number(input.value); draw(); });
    sliders[key] = input;
    return make("label", {}, label, input);
  };
  const sliders = {};
  const planes = [...new Set(all.map((surface) => surface.plane))], kinds = [...new Set(all.map((surface) => surface.kind))];
  const log = make("input", { type: "checkbox" });
  log.addEventListener("change", () => { view.log = log.checked; draw(); });
  const controls = make("div", { class: "controls" });
  if (planes.length > 1) controls.append(chooser("plane", "plane", planes));
  if (kinds.length > 1) controls.append(chooser("kind", "loss", kinds));
  controls.append(slider("turn", "turn", -180, 180), slider("tilt", "tilt", 5, 90), make("label", {}, log, "logarithmic"));
  const views = make("div", { class: "views" });
  const bar = make("canvas", { width: 680, height: 76, role: "img", "aria-label": "colours of the loss" });
  bar.style.maxWidth = "340px";
  bar.style.cursor = "default";
  place.append(controls, views, bar);

  let shown = [];  // { surface, canvas, spots }: spots are the grid points on the screen
  function rebuild() {
    const chosen = all.filter((surface) => surface.plane === view.plane && surface.kind === view.kind);
    shown = chosen.map((surface) => {
      const canvas = make("canvas", { width: 2 * WIDTH, height: 2 * HEIGHT, tabindex: 0, role: "img" });
      canvas.setAttribute("aria-label", `${surface.network}: ${surface.kind} over ${surface.plane}`);
      const one = { surface, canvas, spots: [] };
      listen(one);
      return one;
    });
    views.replaceChildren(...shown.map(({ surface, canvas }) => make("figure", {}, make("figcaption", {}, surface.network), canvas)));
    const positive = range().low > 0;
    log.disabled = !positive;
    view.log = log.checked = positive && range().high > 30 * range().low;
    draw();
  }

  function range() {
    const values = shown.flatMap(({ surface }) => surface.loss.flat()).filter((value) => value !== null);
    return values.length ? { low: Math.min(...values), high: Math.max(...values) } : { low: 0, high: 1 };
  }

  function listen(one) {
    const canvas = one.canvas;
    let last = null;
    canvas.addEventListener("pointerdown", (event) => {
      last = [event.clientX, event.clientY];
      canvas.setPointerCapture(event.pointerId);
      say(one, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (last) {
        turn(0.6 * (event.clientX - last[0]), event.pointerType === "touch" ? 0 : 0.4 * (event.clientY - last[1]));
        last = [event.clientX, event.clientY];
      }
      say(one, event);
    });
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => { last = null; });
    canvas.addEventListener("pointerleave", () => hideTip());
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, 5], ArrowDown: [0, -5] }[event.key];
      if (step) { event.preventDefault(); turn(...step); }
    });
  }

  function turn(across, up) {
    view.turn = ((view.turn + across + 540) % 360) - 180;
    view.tilt = Math.min(90, Math.max(5, view.tilt + up));
    sliders.turn.value = view.turn;
    sliders.tilt.value = view.tilt;
    draw();
  }

  function say(one, event) {
    const box = one.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) * WIDTH / box.width, y = (event.clientY - box.top) * HEIGHT / box.height;
    let best = null, least = 15 * 15;
    for (const spot of one.spots) {
      const distance = (spot.x - x) ** 2 + (spot.y - y) ** 2;
      if (distance < least || (best && distance < least + 9 && spot.depth < best.depth)) { least = Math.min(least, distance); best = spot; }
    }
    if (!best) return hideTip();
    const { surface } = one, { i, j } = best;
    const text = `${surface.network}\n${surface.labels[0]} ${digits(surface.at[j])}\n${surface.labels[1]} ${digits(surface.at[i])}\nloss ${digits(surface.loss[i][j], 4)}`;
    showTip(text, event.clientX, event.clientY);
  }

  const digits = (value, count = 2) => Number(value.toPrecision(count)).toString().replace("-", "−");
  const colour = (share, light = 1) => {
    const at = Math.min(1, Math.max(0, share)) * (STOPS.length - 1), k = Math.min(STOPS.length - 2, Math.floor(at));
    return `rgb(${STOPS[k].map((a, c) => Math.round((a + (STOPS[k + 1][c] - a) * (at - k)) * light)).join(",")})`;
  };

  function heights() {
    const { low, high } = range(), f = view.log ? Math.log : (x) => x;
    return (value) => (high > low ? (f(value) - f(low)) / (f(high) - f(low)) : 0.5);
  }

  function draw(paper = false) {
    const style = getComputedStyle(document.documentElement);
    const ink = paper ? "#1b1f24" : style.getPropertyValue("--ink"), soft = paper ? "#59626e" : style.getPropertyValue("--soft");
    const share = heights();
    for (const one of shown) drawOne(one, share, ink, soft);
    drawBar(ink);
  }

  function drawOne(one, share, ink, soft) {
    const { surface, canvas } = one, context = canvas.getContext("2d"), n = surface.at.length;
    context.setTransform(2, 0, 0, 2, 0, 0);
    context.clearRect(0, 0, WIDTH, HEIGHT);
    const a = view.turn * Math.PI / 180, b = view.tilt * Math.PI / 180;
    const project = (x, y, z) => {  // x, y from -1 to 1, z from 0 to 1
      const across = x * Math.cos(a) - y * Math.sin(a), along = x * Math.sin(a) + y * Math.cos(a);
      return [WIDTH / 2 + 100 * across, HEIGHT / 2 + 20 - 100 * (along * Math.sin(b) + (1.3 * z - 0.45) * Math.cos(b)), along * Math.cos(b) - z * Math.sin(b)];
    };
    const grid = (k) => 2 * k / (n - 1) - 1;
    context.strokeStyle = soft;
    context.lineWidth = 0.8;
    const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]];
    context.beginPath();
    corners.forEach(([x, y], k) => context[k ? "lineTo" : "moveTo"](...project(x, y, 0).slice(0, 2)));
    context.stroke();
    const quads = [];
    one.spots = [];
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
      const value = surface.loss[i][j];
      if (value === null) continue;
      const [x, y, depth] = project(grid(j), grid(i), share(value));
      one.spots.push({ i, j, x, y, depth });
      if (i + 1 === n || j + 1 === n) continue;
      const around = [[i, j], [i, j + 1], [i + 1, j + 1], [i + 1, j]].map(([k, l]) => surface.loss[k][l]);
      if (around.some((v) => v === null)) continue;
      const zs = around.map(share);
      const points = [project(grid(j), grid(i), zs[0]), project(grid(j + 1), grid(i), zs[1]), project(grid(j + 1), grid(i + 1), zs[2]), project(grid(j), grid(i + 1), zs[3])];
      const middle = project((grid(j) + grid(j + 1)) / 2, (grid(i) + grid(i + 1)) / 2, 0)[2];
      quads.push({ points, depth: middle, height: (zs[0] + zs[1] + zs[2] + zs[3]) / 4 });
    }
    quads.sort((p, q) => q.depth - p.depth);
    context.lineWidth = 0.5;
    for (const quad of quads) {
      context.beginPath();
      quad.points.forEach(([x, y], k) => context[k ? "lineTo" : "moveTo"](x, y));
      context.closePath();
      context.fillStyle = colour(quad.height);
      context.strokeStyle = colour(quad.height, 0.82);
      context.fill();
      context.stroke();
    }
    const middle = (n - 1) / 2, here = surface.loss[middle][middle];
    if (here !== null) {
      const [x, y] = project(0, 0, share(here));
      context.strokeStyle = "#ff3b30";
      context.lineWidth = 1.6;
      context.beginPath();
      context.moveTo(x - 5, y); context.lineTo(x + 5, y); context.moveTo(x, y - 5); context.lineTo(x, y + 5);
      context.stroke();
    }
    context.fillStyle = ink;
    context.font = "11px system-ui, sans-serif";
    const edge = digits(Math.max(...surface.at));
    labelAxis(context, project(0, -1.3 * Math.sign(Math.cos(a) || 1), 0), `${surface.labels[0]} ±${edge}`);
    labelAxis(context, project(1.3 * Math.sign(Math.sin(a) || 1) * -1, 0, 0), `${surface.labels[1]} ±${edge}`);
  }

  function labelAxis(context, [x, y], text) {
    const half = context.measureText(text).width / 2;
    context.fillText(text, Math.min(Math.max(2, x - half), WIDTH - 2 * half - 2), Math.min(y + 10, HEIGHT - 4));
  }

  function drawBar(ink) {
    const context = bar.getContext("2d"), { low, high } = range();
    context.setTransform(2, 0, 0, 2, 0, 0);
    context.clearRect(0, 0, WIDTH, 38);
    for (let k = 0; k < 300; k++) { context.fillStyle = colour(k / 299); context.fillRect(20 + k, 4, 1.5, 10); }
    context.fillStyle = ink;
    context.font = "11px system-ui, sans-serif";
    const middle = view.log ? Math.sqrt(low * high) : (low + high) / 2;
    [[low, 20, "left"], [middle, 170, "center"], [high, 320, "right"]].forEach(([value, x, align]) => {
      context.textAlign = align;
      context.fillText(digits(value, 3), x, 28);
    });
    context.textAlign = "left";
    context.fillText(view.log ? "loss (log)" : "loss", 145 + (view.log ? -4 : 10), 38);
  }

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw());
  rebuild();
})();
