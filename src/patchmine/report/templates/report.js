// The page is complete without this file; it adds the read-out, the log scale, other axes below, switching runs off, and the slider.
"use strict";

const { axes, charts } = JSON.parse(document.getElementById("chart-data").textContent);
let axis = axes[0]; // what curves are drawn over; the page comes with steps
const plots = [...document.querySelectorAll(".plot[data-chart]")];
const hidden = new Set(); // runs that are switched off
const show = (element, visible) => element.classList.toggle("off", !visible);

// Where a run is at a step on the axis that is chosen.
function across(run, step) {
  const [steps, values] = axis.clocks[run];
  if (!steps.length) return step;
  let k = 1;
  while (k < steps.length - 1 && steps[k] < step) k += 1;
  if (steps.length < 2 || steps[k] === steps[k - 1]) return values[0];
  const share = Math.min(1, Math.max(0, (step - steps[k - 1]) / (steps[k] - steps[k - 1])));
  return values[k - 1] + share * (values[k] - values[k - 1]);
}

// Where the points of a curve are on that axis, rising.
const places = (curve) => curve.step.map((step) => across(curve.run, step));

// A place on the axis for people.
function told(place) {
  if (axis.key === "step") return `step ${place.toLocaleString("en-US")}`;
  if (axis.key === "epoch") return `epoch ${place.toLocaleString("en-US", { maximumFractionDigits: 2 })}`;
  const digits = axis.key === "images" ? 0 : 1;
  return `${place.toLocaleString("en-US", { maximumFractionDigits: digits })} ${axis.unit}`;
}

// Index of the step nearest to `step` in a rising list.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

function isLog(plot) {
  return plot.closest("figure").querySelector("button.log")?.getAttribute("aria-pressed") === "true";
}

// Show every curve's value nearest to a place on the axis; null: the newest values, no marks.
function readAt(plot, place) {
  const chart = charts[Number(plot.dataset.chart)];
  const figure = plot.closest("figure");
  const scale = isLog(plot) ? "log" : "linear";
  for (const curve of chart.curves) {
    const found = places(curve);
    const last = found.length - 1;
    const at = place === null ? last : nearest(found, place);
    const beyond = place !== null && place > found[last] && place - found[last] > axis.last / 100;
    const value = figure.querySelector(`.value[data-run="${curve.run}"] b`);
    value.textContent = beyond ? "–" : curve.text[at];
    const dot = plot.querySelector(`.dot[data-run="${curve.run}"]`);
    show(dot, place !== null && !beyond && !hidden.has(curve.run));
    dot.style.left = `${(100 * found[at]) / axis.last}%`;
    dot.style.bottom = `${100 * curve[scale][at]}%`;
  }
  figure.querySelector(".at").textContent = place === null ? "last" : told(place);
  const cross = plot.querySelector(".cross");
  show(cross, place !== null && place <= axis.last);
  if (place !== null) cross.style.left = `${(100 * place) / axis.last}%`;
}

// All charts follow, so that one look answers "what else happened there?".
const readAll = (place) => plots.forEach((plot) => readAt(plot, place));

// Places at which the shown curves of a plot have a point, rising.
function placesOf(plot) {
  const shown = charts[Number(plot.dataset.chart)].curves.filter((curve) => !hidden.has(curve.run));
  return [...new Set(shown.flatMap(places))].sort((a, b) => a - b);
}

for (const plot of plots) {
  let current = null;
  const go = (place) => { current = place; readAll(place); };
  plot.addEventListener("pointermove", (event) => {
    const found = placesOf(plot);
    const area = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - area.left) / area.width));
    if (found.length) go(found[nearest(found, share * axis.last)]);
  });
  plot.addEventListener("pointerleave", () => go(null));
  plot.addEventListener("blur", () => go(null));
  plot.addEventListener("keydown", (event) => {
    const found = placesOf(plot);
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !found.length) return;
    event.preventDefault();
    const from = current === null ? (move > 0 ? -1 : found.length) : nearest(found, current);
    go(found[Math.min(found.length - 1, Math.max(0, from + move))]);
  });
}

// Draw all curves over another axis: each x of a path is a step, in thousandths of the steps' axis.
function drawOver(chosen) {
  axis = chosen;
  const steps = axes[0].last / 1000;
  for (const path of document.querySelectorAll("#curves path[data-run]")) {
    path.dataset.steps ??= path.getAttribute("d");
    const moved = (_, x, y) => `${((1000 * across(Number(path.dataset.run), x * steps)) / axis.last).toFixed(1)} ${y}`;
    path.setAttribute("d", axis === axes[0] ? path.dataset.steps : path.dataset.steps.replace(/([\d.]+) ([\d.]+)/g, moved));
  }
  document.querySelectorAll("#curves [data-axis]").forEach((label) => show(label, label.dataset.axis === axis.key));
  readAll(null);
}

const choices = [...document.querySelectorAll("[data-across]")];
for (const button of choices) {
  button.parentElement.classList.remove("off");
  button.addEventListener("click", () => {
    choices.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    drawOver(axes.find((each) => each.key === button.dataset.across));
  });
}

for (const button of document.querySelectorAll("button.log")) {
  button.addEventListener("click", () => {
    const log = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(log));
    const figure = button.closest("figure");
    figure.querySelectorAll(".plot .linear").forEach((element) => show(element, !log));
    figure.querySelectorAll(".plot .log").forEach((element) => show(element, log));
    readAll(null);
  });
}

for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.toggle);
    const visible = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(visible));
    if (visible) hidden.delete(run); else hidden.add(run);
    document.querySelectorAll(`main [data-run="${run}"]:not(.dot)`).forEach((element) => show(element, visible));
    readAll(null);
  });
}

for (const strip of document.querySelectorAll(".strip")) {
  const frames = [...strip.querySelectorAll("figure")];
  const slider = strip.querySelector("input");
  const choose = (chosen) => frames.forEach((frame, k) => show(frame, k === chosen));
  choose(frames.length - 1);
  slider?.addEventListener("input", () => {
    choose(Number(slider.value));
    strip.querySelector("output").textContent = frames[Number(slider.value)].querySelector("figcaption").textContent;
  });
  strip.classList.add("live");
}
