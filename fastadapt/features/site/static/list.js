// The list of units: filters, and the rows in the visible part of the list.
"use strict";

/** The column that each order sorts by; others: the contribution. */
const SORTS = new Map([
  ["effect", "effect"],
  ["densest", "density"],
  ["rarest", "density"],
  ["max", "max"],
  ["weakest", "max"],
  ["shared", "base_share"],
  ["opposed", "base_share"],
  ["index", "index"],
]);

/** Heads of the column after the names, by the key of the order; others: the contribution. */
const SORTED = { effect: "ΔKL", base_share: "In the base" };

class List {
  /** navigate: called with an address to show; onQuery: called with the query of the filters. */
  constructor(navigate, onQuery) {
    this.navigate = navigate;
    this.onQuery = onQuery;
    this.form = document.getElementById("filters");
    this.grid = document.getElementById("grid");
    this.rows = document.getElementById("rows");
    this.nothing = document.getElementById("nothing");
    this.status = document.getElementById("count");
    this.matches = new Uint32Array(0);
    this.chosen = -1; // index of the selected row
    this.pool = [];
    const apply = () => this.typed();
    this.form.addEventListener("input", apply);
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(apply));
    this.nothing.querySelector("button").addEventListener("click", () => this.form.reset());
    const more = document.getElementById("more");
    more.addEventListener("click", () => {
      const open = this.form.classList.toggle("shown");
      more.setAttribute("aria-expanded", open);
    });
    this.grid.addEventListener("scroll", () => this.draw(), { passive: true });
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.rows.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row && !event.target.closest("a") && getSelection().isCollapsed) this.navigate(row.address);
    });
    addEventListener("resize", () => this.draw());
  }

  /** Shows the units of a kind that match the query. */
  show(units, site, tokens, query) {
    const same = this.units === units && this.query().toString() === query.toString();
    if (same) return;
    if (this.units !== units) {
      this.units = units;
      this.fields(site);
    }
    this.tokens = tokens;
    for (const field of this.form.elements) {
      if (!field.name) continue;
      const value = query.get(field.name) ?? "";
      if (field.type === "checkbox") field.checked = value === "1";
      else if (field.value !== value && field !== document.activeElement) field.value = value;
    }
    this.refresh(true);
  }

  fields(site) {
    const { units, form } = this;
    this.regions = site.regions;
    const options = (name, entries) => {
      const select = form.elements[name];
      select.replaceChildren(select.options[0]);
      entries.forEach(([value, text]) => select.append(el("option", { value }, text)));
    };
    options("layer", Array.from({ length: units.layers }, (_, i) => [i, String(i)]));
    options("region", site.regions.map((name, i) => [i, name]));
    const hasScales = units.tables.includes("scales");
    options("origin", hasScales ? site.origins.map((name, i) => [i, name]) : []);
    const classes = [...new Set(units.classes.map(([name]) => name))];
    const entries = classes.map((name) => [JSON.stringify([name]), inlineText(name)]);
    units.classes.forEach(([name, sub]) => {
      if (sub !== null) entries.push([JSON.stringify([name, sub]), inlineText(`${name}: ${sub}`)]);
    });
    options("class", entries.sort((a, b) => (a[1] < b[1] ? -1 : 1)));
    document.getElementById("class-field").hidden = classes.length === 0;
    form.querySelector("option[value=effect]").hidden = !units.tables.includes("effects");
    document.getElementById("origin-field").hidden = !hasScales;
    for (const order of ["shared", "opposed"]) {
      form.querySelector(`option[value=${order}]`).hidden = !hasScales;
    }
    const described = units.tables.includes("descriptions");
    form.elements.q.placeholder = described
      ? "Search descriptions and promoted tokens"
      : "Search promoted tokens";
    this.grid.classList.toggle("with-class", classes.length > 0);
    const heads = ["Layer / no.", "Contribution", "Density", "Mostly in"];
    if (classes.length) heads.push("Class");
    heads.push(described ? "Description, promoted tokens" : "Promoted tokens");
    const cells = heads.map((text) => el("span", { role: "columnheader" }, text));
    this.grid.querySelector(".head").replaceChildren(...cells);
    this.grid.setAttribute("aria-label", `${KIND_NAMES[units.kind]} ${unitNoun(units.kind, 2)}`);
  }

  /** Draws the list at the position stored by leave(), and selects a unit. */
  resume(unit) {
    this.grid.scrollTop = this.position ?? 0;
    this.draw();
    const row = this.matches.indexOf(unit);
    if (row >= 0) this.choose(row);
  }

  /** Stores the scroll position for resume(). */
  leave() {
    this.position = this.grid.scrollTop;
  }

  /** Returns the filters as a query, without empty ones. */
  query() {
    const out = new URLSearchParams();
    for (const field of this.form.elements) {
      if (!field.name) continue;
      const value = field.type === "checkbox" ? (field.checked ? "1" : "") : field.value;
      if (value) out.set(field.name, value);
    }
    return out;
  }

  typed() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      this.onQuery(this.query());
      this.refresh(true);
    });
  }

  wanted() {
    const { elements } = this.form;
    const number = (name) => (elements[name].value === "" ? null : Number(elements[name].value));
    const sort = elements.sort.value;
    const bounds = ["from", "to"].map((name) => {
      const value = parseShare(elements[name].value);
      elements[name].setAttribute("aria-invalid", Number.isNaN(value));
      return Number.isNaN(value) ? null : value;
    });
    let classes = null;
    if (elements.class.value) {
      const [name, sub] = JSON.parse(elements.class.value);
      classes = new Set();
      this.units.classes.forEach(([n, s], code) => {
        if (n === name && (sub === undefined || s === sub)) classes.add(code);
      });
    }
    return {
      q: elements.q.value.trim().toLowerCase(),
      token: elements.token.value.trim().toLowerCase(),
      layer: number("layer"),
      region: number("region"),
      origin: number("origin"),
      classes,
      from: bounds[0],
      to: bounds[1],
      dead: elements.dead.checked,
      key: SORTS.get(sort) ?? "contribution",
      rising: ["rarest", "weakest", "opposed"].includes(sort),
    };
  }

  /** Searches again. fromTop: scroll to the top, else keep position and selection. */
  refresh(fromTop) {
    const { units } = this;
    if (!units) return;
    const chosen = this.matches[this.chosen];
    // Sorted by one of these, the list shows it in place of the contribution.
    const key = SORTS.get(this.form.elements.sort.value);
    this.column = key in SORTED ? key : "contribution";
    this.grid.querySelector(".head").children[1].textContent = SORTED[key] ?? "Contribution";
    this.matches = units.match(this.wanted(), this.tokens);
    this.chosen = fromTop ? -1 : this.matches.indexOf(chosen);
    if (fromTop) this.grid.scrollTop = 0;
    const query = this.query();
    const count = [...query.keys()].filter((name) => name !== "q" && name !== "sort").length;
    document.getElementById("more").textContent = count ? `Filters (${count})` : "Filters";
    document.getElementById("clear").hidden = query.size === 0;
    const all = units.version * units.features;
    const reading = units.whole ? "" : ` · ${units.version} of ${units.layers} layers read`;
    this.status.textContent =
      `${formatInteger(this.matches.length)} of ${formatInteger(all)} ${unitNoun(units.kind, all)}${reading}`;
    this.grid.setAttribute("aria-rowcount", this.matches.length + 1);
    this.nothing.hidden = this.matches.length > 0 || !units.whole;
    const reason = query.size === 0 ? "No unit is active on these texts." : "No unit matches.";
    this.nothing.querySelector("p").textContent = reason;
    this.nothing.querySelector("button").hidden = query.size === 0;
    this.draw();
  }

  // Browsers limit elements to about 17 million pixels in height. For longer lists, one pixel of
  // the scroll bar is `ratio` pixels of the list.
  layout() {
    const height = parseFloat(getComputedStyle(this.grid).getPropertyValue("--row"));
    const view = this.grid.clientHeight - this.rows.offsetTop;
    const full = this.matches.length * height;
    const tall = Math.min(full, 8e6);
    const ratio = tall > view ? (full - view) / (tall - view) : 1;
    return { height, view, tall, ratio };
  }

  draw() {
    if (!this.units || this.grid.offsetParent === null) return;
    const { height, view, tall, ratio } = this.layout();
    this.rows.style.height = `${tall}px`;
    const top = this.grid.scrollTop * ratio;
    const first = Math.max(0, Math.floor(top / height) - 4);
    const last = Math.min(this.matches.length, Math.ceil((top + view) / height) + 4);
    while (this.pool.length < last - first) this.pool.push(this.rows.appendChild(this.blank()));
    this.pool.forEach((row, i) => {
      const index = first + i;
      row.hidden = index >= last;
      if (row.hidden) return;
      const stale = row.units !== this.units || row.query !== current.query;
      if (stale || row.unit !== this.matches[index]) this.fill(row, this.matches[index]);
      row.style.transform = `translateY(${this.grid.scrollTop + index * height - top}px)`;
      row.id = `row-${index}`;
      row.setAttribute("aria-rowindex", index + 2);
      row.setAttribute("aria-selected", index === this.chosen);
    });
    if (this.chosen >= first && this.chosen < last) {
      this.grid.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    } else this.grid.removeAttribute("aria-activedescendant");
  }

  blank() {
    return el("div", { class: "row", role: "row" });
  }

  fill(row, unit) {
    const { units, tokens } = this;
    const layer = Math.floor(unit / units.features);
    const feature = unit % units.features;
    row.unit = unit;
    row.units = units;
    row.query = current.query;
    row.address = address(units.kind, layer, feature);
    const cell = (name, ...children) => el("span", { role: "gridcell", class: name }, ...children);
    const name = `${layer} / ${feature}`;
    const content = cell("says");
    if (units.description[unit] !== undefined) {
      content.append(el("bdi", { class: "text" }, inlineText(units.description[unit])));
    }
    const chips = el("span", { class: "chips" });
    units.promotedOf(unit).forEach((token) => chips.append(tokenChip(tokens.text(token))));
    content.append(chips);
    // Logarithmic scale of the bar, from a density of 1e-7 to 1.
    const share = Math.max(0, 1 + Math.log10(Math.max(units.density[unit], 1e-7)) / 7);
    const region = units.region[unit] === 255 ? "never fired" : this.regions[units.region[unit]];
    const cells = [
      cell("name", el("a", { href: row.address, tabindex: -1 }, name)),
      cell("contribution", this.column === "base_share"
        ? formatPercent(units.base_share[unit])
        : formatNumber(this.measured(unit))),
      cell("density", el("i", { style: { "--share": share } }), formatPercent(units.density[unit])),
      cell("region", region),
    ];
    if (units.classes.length) {
      const names = units.classes[units.class[unit]] ?? [];
      cells.push(cell("class", el("bdi", {}, inlineText(names.filter(Boolean).join(": ")))));
    }
    row.replaceChildren(...cells, content);
  }

  /** Returns a unit's number in the sorted column; null if it never fired or was not measured. */
  measured(unit) {
    const value = this.units[this.column][unit];
    return Number.isFinite(value) && (value !== 0 || this.column === "effect") ? value : null;
  }

  /** Selects a row and scrolls to it. */
  choose(row) {
    if (!this.matches.length) return;
    this.chosen = Math.min(this.matches.length - 1, Math.max(0, row));
    const { height, view, ratio } = this.layout();
    const top = this.grid.scrollTop * ratio;
    const y = this.chosen * height;
    if (y < top) this.grid.scrollTop = y / ratio;
    else if (y + height > top + view) this.grid.scrollTop = (y + height - view) / ratio;
    this.draw();
  }

  key(event) {
    const { height, view } = this.layout();
    const page = Math.max(1, Math.floor(view / height) - 1);
    const steps = {
      ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page,
      Home: -this.matches.length, End: this.matches.length,
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps) this.choose(this.chosen + steps[event.key]);
    else if (event.key === "Enter" && this.chosen >= 0) this.open();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  open() {
    const unit = this.matches[this.chosen];
    const { kind, features } = this.units;
    this.navigate(address(kind, Math.floor(unit / features), unit % features));
  }
}
