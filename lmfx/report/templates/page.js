"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const source = $("data");
const tip = $("tip");

/* What points at something, or has the focus, is told in words. */
const tell = (text, x, y) => {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
};
document.addEventListener("pointermove", (event) => {
  const found = event.target.closest && event.target.closest("[data-tip]");
  if (found) tell(found.dataset.tip, event.clientX, event.clientY); else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  const found = event.target.closest("[data-tip]");
  if (!found) { tip.hidden = true; return; }
  const box = found.getBoundingClientRect();
  tell(found.dataset.tip, box.left + 40, box.top + box.height / 2);
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

if (!source) return;
const data = JSON.parse(source.textContent);
const group = (name) => {
  const found = new Map();
  for (const element of all("[data-" + name + "]")) {
    const key = Number(element.dataset[name]);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(element);
  }
  return found;
};
const changes = group("change"), rows = group("row"), edges = group("edge"), colors = group("color");
const set = (map, keys, action) => { for (const key of keys) for (const element of map.get(key) || []) action(element); };
/* The longest bar that is seen has the whole width. */
const width = (bar) => Number(bar.style.getPropertyValue("--w"));
const bars = all("#bars tbody tr").map((row) => [row, Math.max(...[...row.querySelectorAll(".bar > *")].map(width))]);
let shown = { changes: [], rows: new Map(), edges: new Set() };

/* Shows one plan: its changes appear, and what they replace goes. */
const show = (plan) => {
  const next = { changes: plan.changes, rows: new Map(), edges: new Set() };
  for (const number of plan.changes) {
    const change = data.changes[number];
    for (const [first, last] of change.rows) for (let row = first; row <= last; row++) next.rows.set(row, change.kind);
    for (const edge of change.edges) next.edges.add(edge);
  }
  set(changes, shown.changes, (element) => element.setAttribute("hidden", ""));
  set(rows, shown.rows.keys(), (element) => element.removeAttribute("hidden"));
  set(edges, shown.edges, (element) => element.removeAttribute("hidden"));
  set(colors, shown.rows.keys(), (element) => color(element, "keep"));
  set(changes, next.changes, (element) => element.removeAttribute("hidden"));
  set(rows, next.rows.keys(), (element) => element.setAttribute("hidden", ""));
  set(edges, next.edges, (element) => element.setAttribute("hidden", ""));
  for (const [row, kind] of next.rows) set(colors, [row], (element) => color(element, kind));
  shown = next;
  const most = bars.reduce((so, [row, width]) => (row.hasAttribute("hidden") ? so : Math.max(so, width)), 0);
  if (most) $("bars").style.setProperty("--most", most);
};
const color = (element, kind) => {
  for (const name of [...element.classList]) if (name.startsWith("k-")) element.classList.remove(name);
  element.classList.add("k-" + kind);
};

const slider = $("budget");
const say = (plan, which) => {
  for (const name of ["ms", "share", "speed", "loss", "plan"]) $("say-" + name).textContent = plan.say[name];
  $("which").textContent = which;
  $("short").textContent = plan.say.ms;
  slider.setAttribute("aria-valuetext", which + ": " + plan.say.ms + ", " + plan.say.share + " of the original, loss " + plan.say.loss);
};
const at = $("at");
const home = at && [at.getAttribute("cx"), at.getAttribute("cy")];
const mark = (stop) => {
  const point = stop === null ? null : document.querySelector('[data-stop="' + stop + '"]');
  at.setAttribute("cx", point ? point.getAttribute("cx") : home[0]);
  at.setAttribute("cy", point ? point.getAttribute("cy") : home[1]);
  at.classList.toggle("own", !point);
};
const go = (stop) => {
  const plan = data.stops[stop];
  slider.value = stop;
  document.body.dataset.plan = stop;
  $("back").disabled = false;
  say(plan, "Point " + (plan.point + 1));
  mark(stop);
  show(plan);
};
const result = () => {
  document.body.dataset.plan = "result";
  show(data.result);
  if (!slider) return;
  slider.value = data.nearest;
  $("back").disabled = true;
  say(data.result, "The result");
  mark(null);
};
if (slider) {
  slider.addEventListener("input", () => go(Number(slider.value)));
  $("back").addEventListener("click", result);
  $("chart").addEventListener("click", (event) => {
    const points = all("[data-stop]");
    const far = (e) => { const b = e.getBoundingClientRect(); return Math.hypot(b.left + b.width / 2 - event.clientX, b.top + b.height / 2 - event.clientY); };
    go(Number(points.reduce((a, b) => (far(b) < far(a) ? b : a)).dataset.stop));
    slider.focus({ preventScroll: true });
  });
}

/* Arrow keys go from layer to layer in the drawing. */
const layers = all("#network .row");
$("drawing").addEventListener("keydown", (event) => {
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  const here = layers.indexOf(document.activeElement);
  const next = Math.max(0, Math.min(layers.length - 1, here < 0 ? 0 : here + steps[event.key]));
  event.preventDefault();
  layers[next].focus();
});
result();
/* What was changed is seen at once, also where the network begins with many layers that were kept. */
const first = layers.find((layer) => shown.rows.has(Number(layer.dataset.at)));
if (first) {
  const box = $("drawing"), far = first.getBoundingClientRect().top - box.getBoundingClientRect().top;
  if (far > box.clientHeight / 2) box.scrollTop = far - box.clientHeight / 5;
}
document.body.classList.add("ready");
})();
