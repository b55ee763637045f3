/* What a cell printed after a prediction stays folded until the reader has chosen (the tag
   hide-output). Without this script each output opens by itself; with it, one click opens them all. */
(() => {
  "use strict";
  const folded = ".bd-article div.cell > details.below-input";
  const boxes = [...document.querySelectorAll(`${folded}, .bd-article details:not(.hide)`)];
  const folds = boxes.filter(box => box.matches(folded));

  // A group is a run of folded outputs; the box that ends it holds the answer in words.
  let group = [];
  for (const box of boxes) {
    const outputs = group;
    const isOutput = folds.includes(box);
    if (isOutput) group.push(box);
    else group = [];
    box.addEventListener("toggle", () => {
      if (box.open) for (const output of outputs) output.open = true;
    });
  }

  if (folds.length) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "open-all";
    button.textContent = "Open every prediction on this page";
    button.addEventListener("click", () => {
      for (const box of boxes) box.open = true;
      button.remove();
    });
    folds[0].after(button);
  }
  addEventListener("beforeprint", () => {
    for (const box of boxes) box.open = true;
  });
})();
