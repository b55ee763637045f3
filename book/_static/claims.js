/* What a reader believes before chapter 1, met again in chapter 12. Kept in this browser alone. */
(() => {
  "use strict";
  const KEY = "qlora-lab-claims";
  const WORDS = { true: "true", depends: "true of something, not of all", false: "false" };
  const SURE = { guess: "a guess", fairly: "fairly sure", certain: "certain" };

  const load = () => {
    try {
      return JSON.parse(localStorage.getItem(KEY)) || {};
    } catch {
      return {};  // private windows may forbid it: the page still works, it only forgets
    }
  };
  const store = marks => {
    try {
      localStorage.setItem(KEY, JSON.stringify(marks));
    } catch { /* see above */ }
  };

  const form = document.querySelector("form.pretest");
  if (form) {
    const status = form.querySelector(".pretest-status");
    const fields = [...form.querySelectorAll("fieldset")];
    const tell = () => {
      const done = fields.filter(f => f.querySelector("input:checked")).length;
      status.textContent = `${done} of ${fields.length} marked`;
    };
    const show = () => {
      const marks = load();
      for (const field of fields) {
        const mark = marks[field.dataset.claim] || {};
        for (const input of field.querySelectorAll("input"))
          input.checked = input.value === mark.belief;
        field.querySelector("select").value = mark.sure || "guess";
      }
      tell();
    };
    form.addEventListener("change", event => {
      const field = event.target.closest("fieldset");
      const chosen = field.querySelector("input:checked");
      if (chosen) {
        const marks = load();
        const sure = field.querySelector("select").value;
        marks[field.dataset.claim] = { belief: chosen.value, sure };
        store(marks);
      }
      tell();
    });
    form.addEventListener("reset", () => {
      store({});
      setTimeout(show);
    });
    form.addEventListener("submit", event => event.preventDefault());
    show();
  }

  const anchors = [...document.querySelectorAll("a[id^='claim-'][data-verdict]")];
  if (anchors.length) {
    const marks = load();
    const rows = [];
    for (const anchor of anchors) {
      const mark = marks[anchor.id.slice(6)];
      if (!mark || !WORDS[mark.belief]) continue;
      const right = mark.belief === anchor.dataset.verdict;
      rows.push({ sure: mark.sure, right });
      const note = document.createElement("p");
      note.className = `claim-mark ${right ? "right" : "wrong"}`;
      note.textContent = `Before chapter 1 you said: ${WORDS[mark.belief]} (${SURE[mark.sure]}).`;
      const place = anchor.closest("p");  // an anchor stands in a line of its own before its claim
      (place.nextElementSibling ?? place).after(note);
    }
    const place = document.getElementById("your-marks");
    if (place && rows.length) {
      const right = rows.filter(r => r.right).length;
      let text = `Of ${anchors.length} claims you marked ${rows.length}; ${right} as this chapter does.`;
      for (const [key, words] of Object.entries(SURE)) {
        const some = rows.filter(r => r.sure === key);
        if (some.length)
          text += ` Where you were ${words === "a guess" ? "guessing" : words}: ` +
            `${some.filter(r => r.right).length} of ${some.length}.`;
      }
      place.textContent = text;
    }
  }
})();
