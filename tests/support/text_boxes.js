// Returns what a person could not read on the page: text or markers that are cut off, text that lies
// on other text, and buttons that lie on data. Each complaint is a string.
() => {
  const complaints = [];
  const shown = (element) => {
    for (let at = element; at instanceof Element; at = at.parentElement) {
      const style = getComputedStyle(at);
      if (style.display === "none" || style.visibility === "hidden" || +style.opacity === 0) return false;
      if (at.tagName === "DETAILS" && !at.open && !element.closest("summary")) return false;
    }
    return true;
  };
  const words = (text) => `"${text.trim().replace(/\s+/g, " ").slice(0, 40)}"`;
  const hides = (style) => style.overflowX !== "visible" || style.overflowY !== "visible";

  // Every line of text with its box, and the element or text node that it belongs to.
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, svg, noscript") || !shown(element)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) boxes.push({ owner: node, element, box, text: node.data });
  }
  for (const element of document.querySelectorAll("svg text")) {
    if (!element.textContent.trim() || element.closest(".hoverlayer") || !shown(element)) continue;
    const box = element.getBoundingClientRect();
    if (box.width) boxes.push({ owner: element, element, box, text: element.textContent });
  }

  for (const { element, box, text } of boxes) {
    if (box.left < -1 || box.right > innerWidth + 1) complaints.push(`outside the window: ${words(text)}`);
    for (let at = element.closest("text") ? element.closest("svg") : element; at; at = at.parentElement) {
      if (!hides(getComputedStyle(at))) continue;
      const { left, right, top, bottom } = at.getBoundingClientRect();
      const inside = box.left >= left - 1 && box.right <= right + 1;
      const isTall = at.tagName !== "svg" || (box.top >= top - 1 && box.bottom <= bottom + 1);
      if (!(inside && isTall)) complaints.push(`cut off by ${at.tagName} ${at.className.baseVal ?? at.className}: ${words(text)}`);
    }
  }

  boxes.sort((one, other) => one.box.top - other.box.top);
  boxes.forEach((one, i) => {
    for (const other of boxes.slice(i + 1)) {
      if (other.box.top >= one.box.bottom) break;
      if (one.owner === other.owner) continue;
      const wide = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
      const tall = Math.min(one.box.bottom, other.box.bottom) - other.box.top;
      if (wide > 1.5 && tall > 2.5) complaints.push(`overlap: ${words(one.text)} and ${words(other.text)}`);
    }
  });

  for (const plot of document.querySelectorAll(".plot")) {
    const area = plot.querySelector(".nsewdrag")?.getBoundingClientRect();
    for (const marker of plot.querySelectorAll(".scatterlayer .points path")) {
      const box = marker.getBoundingClientRect();
      if (!box.width || !shown(marker)) continue;
      const clip = marker.closest("[clip-path]") ? area : plot.getBoundingClientRect();
      const inside = box.left >= clip.left - 1 && box.right <= clip.right + 1 && box.top >= clip.top - 1 && box.bottom <= clip.bottom + 1;
      if (!inside) complaints.push(`a marker of ${plot.id} is cut off`);
    }
    for (const button of plot.querySelectorAll(".modebar-btn")) {
      const box = button.getBoundingClientRect(); // there, if not seen before a pointer is over the plot
      if (box.bottom > area.top + 1 && box.left < area.right) complaints.push(`a button lies on the data of ${plot.id}`);
    }
    for (const bars of plot.querySelectorAll(".barlayer .point path")) {
      if (!bars.getBoundingClientRect().height) complaints.push(`a bar of ${plot.id} is missing`);
    }
  }
  return [...new Set(complaints)];
}
