// Parts of every site: errors, tooltips, the vocabulary and the texts of the store.
"use strict";

function showError(error) {
  const line = document.getElementById("trouble");
  line.textContent = error ? error.message : "";
  line.hidden = !error;
}

function readTokens() {
  readTokens.once ??= fastadapt.load("tokens").then((read) => new Tokens(read));
  return readTokens.once;
}

function readTexts() {
  readTexts.once ??= fastadapt.load("texts").then(({ facts, columns }) =>
    new Map(Array.from(columns.text, (text, i) => [text, facts.ids[i]])));
  return readTexts.once;
}

/** Marks the time at which the present changes are on the screen. */
function markDrawn(name) {
  requestAnimationFrame(() => setTimeout(() => performance.mark(name)));
}

function enableTooltips() {
  const tip = document.getElementById("tip");
  document.addEventListener("pointerover", (event) => {
    const owner = event.target.closest?.("[data-tip]");
    tip.hidden = !owner;
    if (!owner) return;
    tip.textContent = owner.dataset.tip;
    const boxes = Array.from(owner.getClientRects()); // one per line of the text
    const box = boxes.find(({ bottom }) => event.clientY <= bottom) ?? owner.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  });
  addEventListener("scroll", () => (tip.hidden = true), { passive: true, capture: true });
}
