"use strict";
// Sorting, by a button in each heading. Without JavaScript the tables stay as they are.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    return "sortValue" in cell.dataset ? Number(cell.dataset.sortValue) : cell.textContent.trim();
  };
  const isWord = (value) => typeof value === "string";
  const compare = (a, b, sign) => {
    // Words such as "not run" stand last, whichever way the numbers are sorted.
    if (isWord(a) !== isWord(b)) return isWord(a) ? 1 : -1;
    return sign * (isWord(a) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  };
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...body.rows];
      rows.sort((a, b) => compare(key(a, column), key(b, column), ascending ? 1 : -1));
      body.append(...rows);
    });
  });
}
