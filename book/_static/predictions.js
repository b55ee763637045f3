/* What a cell shows where a prediction waits for its answer stays folded until the reader has chosen
   (the tag hide-output). Without this script each output opens by itself; with it, one click opens
   all of a prediction. */
(() => {
  "use strict";
  const folded = ".bd-article div.cell > details.below-input";
  const boxes = [...document.querySelectorAll(`${folded}, .bd-article details:not(.hide)`)];

  // The answer in words that a cell's output stands right below, if there is one.
  const answerAbove = fold => {
    let element = fold.closest("div.cell");
    while (element?.matches("div.cell")) element = element.previousElementSibling;
    return element?.matches("details") ? element : null;
  };

  // A prediction: its outputs, and the box with its answer, which stands below or above them.
  const predictions = [];
  let waiting = null;
  for (const box of boxes) {
    const above = box.matches(folded) && !waiting ? answerAbove(box) : null;
    const known = predictions.find(({ answer }) => answer && answer === above);
    if (known) known.outputs.push(box);
    else if (box.matches(folded)) {
      if (!waiting) predictions.push(waiting = { outputs: [], answer: null });
      waiting.outputs.push(box);
    } else if (waiting) {
      waiting.answer = box;
      waiting = null;
    } else predictions.push({ outputs: [], answer: box });
  }

  for (const { outputs, answer } of predictions)
    for (const box of [...outputs, answer])
      box?.addEventListener("toggle", () => {
        if (box.open) for (const output of outputs) output.open = true;
      });

  const first = document.querySelector(folded);
  if (first) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "open-all";
    button.textContent = "Open every prediction on this page";
    button.addEventListener("click", () => {
      for (const box of boxes) box.open = true;
      button.remove();
    });
    first.after(button);
  }
  addEventListener("beforeprint", () => {
    for (const box of boxes) box.open = true;
  });
})();
