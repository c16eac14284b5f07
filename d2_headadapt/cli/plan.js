"use strict";
// Search, highlighting under the pointer, and opening what is folded before printing. The page is complete without it.
const plain = (text) => text.toLowerCase().replace(/[-_\s]+/g, " ").trim();
const PRINT_MOST = 3000;

for (const space of document.querySelectorAll("section.space")) {
  const find = space.querySelector(".find");
  if (!find) continue;
  const input = find.querySelector("input");
  const output = find.querySelector("output");
  const folds = [...space.querySelectorAll("details.fold")];
  const started = folds.map((fold) => fold.open);
  let items = null;
  let timer = 0;

  const search = () => {
    items ??= [...space.querySelectorAll("li:has(> b)")].map((li) => [li, [...li.querySelectorAll("b")].map((b) => plain(b.textContent))]);
    const wanted = plain(input.value);
    const hit = new Set();
    let count = 0;
    for (const [li, names] of items) {
      const found = names.some((name) => name.includes(wanted));
      li.classList.toggle("miss", !found);
      if (!found || !wanted) continue;
      count += 1;
      const fold = li.closest("details.fold");
      if (fold) hit.add(fold);
    }
    output.textContent = wanted ? `${count} row${count === 1 ? "" : "s"}` : "";
    const opened = new Set();
    folds.forEach((fold, i) => {
      const floating = fold.name !== "";
      fold.classList.toggle("hit", floating && hit.has(fold));
      fold.classList.toggle("miss", !floating && wanted !== "" && !hit.has(fold));
      // Floating lists cover each other: the first one with a match opens.
      fold.open = wanted ? hit.has(fold) && !(floating && opened.has("floating")) : started[i];
      if (floating && fold.open) opened.add("floating");
    });
  };
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, 120);
  });
  find.hidden = false;
}

for (const picture of document.querySelectorAll(".picture")) {
  const mark = (event) => {
    for (const on of picture.querySelectorAll(".on")) on.classList.remove("on");
    const under = event.type === "pointerleave" ? null : event.target.closest("[data-s], [data-t]");
    const { s, t } = under ? under.dataset : {};
    const links = under
      ? [...picture.querySelectorAll(".link")].filter((x) => (s === undefined || x.dataset.s === s) && (t === undefined || x.dataset.t === t))
      : [];
    picture.classList.toggle("busy", links.length > 0);
    for (const link of links) {
      link.classList.add("on");
      picture.querySelector(`.s > [data-s="${link.dataset.s}"]`)?.classList.add("on");
      picture.querySelector(`.t > [data-t="${link.dataset.t}"]`)?.classList.add("on");
    }
  };
  picture.addEventListener("pointerover", mark);
  picture.addEventListener("pointerleave", mark);
}

addEventListener("beforeprint", () => {
  for (const space of document.querySelectorAll("section.space")) {
    if (space.querySelectorAll("li > b").length > PRINT_MOST) continue;
    for (const fold of space.querySelectorAll("details.fold:not([open])")) {
      if (!fold.name) {
        fold.dataset.printed = "";
        fold.open = true;
        continue;
      }
      const names = [...fold.querySelectorAll("li > b")].map((b) => b.textContent).join(", ");
      const line = document.createElement("p");
      line.className = "printed";
      line.textContent = `${fold.querySelector("strong").textContent}: ${names}`;
      space.append(line);
    }
  }
});
addEventListener("afterprint", () => {
  for (const line of document.querySelectorAll(".printed")) line.remove();
  for (const fold of document.querySelectorAll("[data-printed]")) {
    fold.open = false;
    delete fold.dataset.printed;
  }
});
