// Click a head to sort by it: numbers from the largest, texts from A; once more turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const units = { kB: 1e3, MB: 1e6, GB: 1e9 };
  const value = (row, i) => {
    const text = row.cells[i].textContent.trim();
    const number = parseFloat(text.replace(/[,<]/g, ""));
    return isNaN(number) ? text : number * (units[text.split(" ").pop()] || 1);
  };
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (head.className === "bar") return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.ariaSort ? (head.ariaSort === "ascending" ? -1 : 1) : head.className === "number" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      const rows = [...body.rows].map((row) => [value(row, i), row]);
      rows.sort(([a], [b]) => sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(b, "en", { numeric: true })));
      body.append(...rows.map(([, row]) => row));
    };
  });
}
