// Pictures into every tile, the neighbours of what is chosen, arrow keys, the filter.
"use strict";

const { items, others } = JSON.parse(document.getElementById("explore-data").textContent);
const every = [...document.querySelectorAll("#all .tile")];
const chosen = document.getElementById("chosen");
const back = document.getElementById("back");
const trail = []; // what was chosen, the present one last
const ENLARGED = 80; // pixels below which an image is shown as squares

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A copy of an item's picture, or of what stands in its place.
function picture(number) {
  const copy = every[number].firstElementChild.cloneNode(true);
  copy.removeAttribute("loading");
  return copy;
}

function tile(number, caption) {
  const label = `${items[number].name}, cosine ${caption}`;
  const button = make("button", { type: "button", class: "tile", "data-item": number, "aria-label": label });
  button.append(picture(number), make("span", { class: "caption" }, caption));
  return make("li", {}, button);
}

// A neighbour that the page has no picture of: its name and cosine.
function absent(name, caption) {
  return make("li", { class: "absent" }, name, make("small", {}, `${caption}, not on this page`));
}

// One stop of the Tab key for each list; arrow keys go through it.
function setStops(list, current) {
  const tiles = [...list.querySelectorAll(".tile")].filter((each) => !each.closest(".off"));
  const stop = current ?? tiles[0];
  for (const each of list.querySelectorAll(".tile")) each.tabIndex = each === stop ? 0 : -1;
  return tiles;
}

function show(number) {
  const item = items[number];
  chosen.classList.remove("off");
  document.getElementById("chosen-picture").replaceChildren(picture(number));
  document.getElementById("chosen-name").textContent = item.name;
  document.getElementById("chosen-facts").replaceChildren(
    ...item.facts.map(([label, text]) => make("div", {}, make("dt", {}, label), make("dd", {}, text))));
  const near = document.getElementById("chosen-near");
  near.replaceChildren(...item.near.map(([other, cosine]) =>
    other < items.length ? tile(other, cosine) : absent(others[other - items.length], cosine)));
  near.scrollLeft = 0;
  setStops(near);
  for (const each of document.querySelectorAll("main .tile"))
    if (Number(each.dataset.item) === number) each.setAttribute("aria-current", "true");
    else each.removeAttribute("aria-current");
  back.disabled = trail.length < 2;
  document.getElementById("spoken").textContent =
    `${item.name}. ${item.facts.map((fact) => fact.join(" ")).join(". ")}`;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".tile");
  if (!button) return;
  const inside = chosen.contains(button), number = Number(button.dataset.item);
  if (trail.at(-1) !== number) trail.push(number);
  setStops(button.closest(".tiles"), button);
  show(number);
  if (inside) document.getElementById("chosen-name").focus(); // the tile that had the focus is gone
});

back.addEventListener("click", () => {
  trail.pop();
  show(trail.at(-1));
  if (back.disabled) document.getElementById("chosen-name").focus();
});

document.addEventListener("keydown", (event) => {
  const button = event.target.closest(".tile");
  if (!button) return;
  const tiles = setStops(button.closest(".tiles"), button), at = tiles.indexOf(button);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tiles.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const next = tiles[Math.min(tiles.length - 1, Math.max(0, to))];
  setStops(button.closest(".tiles"), next);
  next.focus();
});

const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  let found = 0;
  every.forEach((each, number) => {
    const fits = items[number].name.toLowerCase().includes(wanted);
    each.parentElement.classList.toggle("off", !fits);
    found += fits;
  });
  document.getElementById("found").textContent = wanted ? `${found.toLocaleString("en-US")} found` : "";
  setStops(document.querySelector("#all .tiles"));
});

for (const image of document.querySelectorAll("#all img"))
  image.classList.toggle("small", Math.max(image.getAttribute("width"), image.getAttribute("height")) < ENLARGED);
for (const button of document.querySelectorAll("main section:not(#all) .tile"))
  button.firstElementChild.replaceWith(picture(Number(button.dataset.item)));
document.querySelectorAll(".tiles").forEach((list) => setStops(list));
const first = document.querySelector("main .tile");
trail.push(Number(first.dataset.item));
show(trail[0]);
