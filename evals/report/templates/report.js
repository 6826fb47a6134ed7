"use strict";
// Missing values stay last in both directions; numbers go before texts.
function compare(a, b, descending) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const x = Number(a), y = Number(b);
  const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  return descending ? -order : order;
}

function button(parent, label, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.append(...parent.childNodes);
  made.title = label;
  made.addEventListener("click", onClick);
  parent.append(made);
  return made;
}

for (const settings of document.querySelectorAll(".settings")) {
  const table = settings.querySelector("table");
  const heads = [...table.tHead.rows[0].cells];
  const bodies = () => [...table.tBodies];
  heads.forEach((head, column) => button(head, "sort by this column", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (body) => body.rows[0].cells[column].dataset.sort;
    table.append(...bodies().sort((a, b) => compare(key(a), key(b), descending)));
  }));
  for (const body of bodies()) {
    const made = body.querySelector(".made");
    made.hidden = true;
    const toggle = button(body.querySelector(".name"), "how it was made", () => {
      made.hidden = !made.hidden;
      toggle.setAttribute("aria-expanded", String(!made.hidden));
    });
    toggle.setAttribute("aria-expanded", "false");
  }
  const filter = settings.querySelector(".filter");
  filter.hidden = false;
  filter.querySelector("select").addEventListener("change", (event) => {
    for (const body of bodies()) body.hidden = event.target.value !== "" && body.dataset.sides !== event.target.value;
  });
}
