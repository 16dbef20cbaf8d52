// Click a head to sort by it: numbers from the largest, texts from A; once more turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const units = { kB: 1e3, MB: 1e6, GB: 1e9 };
  const value = (row, i) => {
    const text = row.cells[i].textContent.trim();
    const number = parseFloat(text.replace(/[,<]/g, ""));
    return isNaN(number) ? text : number * (units[text.split(" ").pop()] || 1);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(b, "en", { numeric: true });
  const sort = (i) => {
    const first = heads[i].className === "number" ? "descending" : "ascending";
    const order = heads[i].ariaSort === first ? (first === "ascending" ? "descending" : "ascending") : first;
    for (const head of heads) head.ariaSort = null;
    heads[i].ariaSort = order;
    const rows = [...table.tBodies[0].rows].map((row) => [value(row, i), row]);
    rows.sort(([a], [b]) => (order === "ascending" ? 1 : -1) * compare(a, b));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  heads.forEach((head, i) => {
    if (head.className === "bar") return;
    // Not a <button>: browsers leave controls out of the heads that they repeat on each printed page.
    const button = document.createElement("span");
    button.append(...head.childNodes);
    Object.assign(button, { role: "button", tabIndex: 0, onclick: () => sort(i) });
    button.onkeydown = (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), sort(i));
    head.append(button);
  });
}
