"use strict";
// Tables: a click on a column's head sorts within groups, best values first, then the other way round; words above a
// table leave the rows that hold them all.
for (const section of document.querySelectorAll("section.table")) {
  const table = section.querySelector("table.results");
  const input = section.querySelector("input.filter");
  if (!table) continue;

  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value;
    if (text === undefined) return cell.textContent.trim();
    return text === "" ? null : Number(text);
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);

  for (const head of table.tHead.rows[0].cells) {
    const button = head.querySelector("button");
    if (!button) continue;
    button.addEventListener("click", () => {
      const first = head.dataset.better === "higher" ? "descending" : "ascending";
      const other = first === "descending" ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      for (const body of table.tBodies) {
        const rows = [...body.querySelectorAll("tr.row")];
        const column = head.cellIndex;
        const missing = (row) => value(row, column) === null;
        rows.sort((a, b) => {
          if (missing(a) || missing(b)) return missing(a) - missing(b);
          return sign * compare(value(a, column), value(b, column));
        });
        body.append(...rows);
      }
    });
  }

  if (!input) continue;
  const shown = section.querySelector(".shown");
  input.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const body of table.tBodies) {
      let left = 0;
      const name = (body.querySelector("tr.group") || { textContent: "" }).textContent;
      for (const row of body.querySelectorAll("tr.row")) {
        const text = (row.cells[0].textContent + " " + name).toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        left += !row.hidden;
      }
      body.hidden = left === 0;
      count += left;
    }
    shown.textContent = words.length ? count + " of " + table.querySelectorAll("tr.row").length + " rows" : "";
  });
}
