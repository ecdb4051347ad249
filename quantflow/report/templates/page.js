"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));

  // Without a script the page is complete; what needs one is shown from here.
  all("[data-needs-script]").forEach((element) => element.removeAttribute("hidden"));

  const theme = document.getElementById("theme");
  const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  nameTheme();

  // Sorting: numbers by data-sort, else by text; what has no value stays last in both directions.
  const key = (row, column, numeric) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    if (!numeric) return text.toLowerCase();
    const number = text === "" ? NaN : Number(text);
    return Number.isNaN(number) ? null : number;
  };
  const sort = (table, column, direction) => {
    const heads = all("thead th", table);
    const numeric = heads[column].classList.contains("num");
    const sign = direction === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).map((row) => [key(row, column, numeric), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      if (a === b) return 0;
      return sign * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", direction);
    body.append(...rows.map(([, row]) => row));
  };
  all("table[data-sortable]").forEach((table) => {
    all("thead th", table).forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const first = head.dataset.first || "ascending";
        const second = first === "ascending" ? "descending" : "ascending";
        sort(table, column, head.getAttribute("aria-sort") === first ? second : first);
      });
    });
  });

  // Filtering: every word must occur in the row; a choice must equal the row's data-kind.
  all("[data-filter]").forEach((tools) => {
    const table = document.getElementById(tools.dataset.filter);
    const input = tools.querySelector("input");
    const choice = tools.querySelector("select");
    const count = tools.querySelector(".count");
    const rows = Array.from(table.tBodies[0].rows);
    const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const kind = choice ? choice.value : "";
      let shown = 0;
      rows.forEach((row) => {
        const fits = words.every((word) => texts.get(row).includes(word)) && (!kind || row.dataset.kind === kind);
        row.hidden = !fits;
        shown += fits;
      });
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    input.addEventListener("input", apply);
    if (choice) choice.addEventListener("change", apply);
    tools.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      input.value = "";
      if (choice) choice.value = "";
      apply();
    });
    apply();
  });
})();
