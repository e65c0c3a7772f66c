// The page is complete without this file; it adds the read-out, the log scale, switching runs off, and the slider.
"use strict";

const charts = JSON.parse(document.getElementById("chart-data").textContent);
const plots = [...document.querySelectorAll(".plot[data-chart]")];
const hidden = new Set(); // runs that are switched off
const show = (element, visible) => element.classList.toggle("off", !visible);

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

// Show every curve's value nearest to `step`; null: the newest values, no marks.
function readAt(plot, step) {
  const chart = charts[Number(plot.dataset.chart)];
  const figure = plot.closest("figure");
  const scale = isLog(plot) ? "log" : "linear";
  for (const curve of chart.curves) {
    const last = curve.step.length - 1;
    const at = step === null ? last : nearest(curve.step, step);
    const beyond = step !== null && step > curve.step[last] && step - curve.step[last] > chart.last_step / 100;
    const value = figure.querySelector(`.value[data-run="${curve.run}"] b`);
    value.textContent = beyond ? "–" : curve.text[at];
    const dot = plot.querySelector(`.dot[data-run="${curve.run}"]`);
    show(dot, step !== null && !beyond && !hidden.has(curve.run));
    dot.style.left = `${100 * curve.across[at]}%`;
    dot.style.bottom = `${100 * curve[scale][at]}%`;
  }
  figure.querySelector(".at").textContent = step === null ? "last" : `step ${step.toLocaleString("en-US")}`;
  const cross = plot.querySelector(".cross");
  show(cross, step !== null && step <= chart.last_step);
  if (step !== null) cross.style.left = `${(100 * step) / chart.last_step}%`;
}

// All charts follow, so that one look answers "what else happened there?".
const readAll = (step) => plots.forEach((plot) => readAt(plot, step));

// Steps at which the shown curves of a plot have a point, rising.
function stepsOf(plot) {
  const shown = charts[Number(plot.dataset.chart)].curves.filter((curve) => !hidden.has(curve.run));
  return [...new Set(shown.flatMap((curve) => curve.step))].sort((a, b) => a - b);
}

for (const plot of plots) {
  let current = null;
  const go = (step) => { current = step; readAll(step); };
  plot.addEventListener("pointermove", (event) => {
    const steps = stepsOf(plot);
    const area = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - area.left) / area.width));
    if (steps.length) go(steps[nearest(steps, share * charts[Number(plot.dataset.chart)].last_step)]);
  });
  plot.addEventListener("pointerleave", () => go(null));
  plot.addEventListener("blur", () => go(null));
  plot.addEventListener("keydown", (event) => {
    const steps = stepsOf(plot);
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !steps.length) return;
    event.preventDefault();
    const from = current === null ? (move > 0 ? -1 : steps.length) : nearest(steps, current);
    go(steps[Math.min(steps.length - 1, Math.max(0, from + move))]);
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

const all = document.getElementById("all-settings");
if (all) {
  const same = [...document.querySelectorAll("table.settings tr.same")];
  const choose = (visible) => {
    all.setAttribute("aria-pressed", String(visible));
    same.forEach((row) => show(row, visible));
  };
  choose(same.length === document.querySelectorAll("table.settings tbody tr").length);
  all.addEventListener("click", () => choose(all.getAttribute("aria-pressed") !== "true"));
}
