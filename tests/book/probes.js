// What a test measures in a page. `probes.width()` and the others return what is wrong.
window.probes = {};

// Elements wider than the screen, unless they scroll by themselves.
probes.width = () => {
  const screen = document.documentElement.clientWidth;
  const scrolls = document.documentElement.scrollWidth;
  if (scrolls <= screen) return [];
  const inside = e => {
    for (let p = e.parentElement; p; p = p.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return true;
    return false;
  };
  const wide = [...document.querySelectorAll('body *')].filter(
    e => e.getBoundingClientRect().right > screen + 1 && !inside(e));
  return [`${scrolls} > ${screen}`, ...wide.slice(0, 5).map(e => e.tagName + '.' + e.className)];
};

// Text against its ground, as WCAG 2 defines it: 4.5 to 1, and 3 to 1 where the text is large
// (24 px, or 18.66 px bold). Folded text is unfolded first.
probes.contrast = () => {
  const parse = c => {
    const v = c.match(/[\d.]+/g).map(Number);
    const scale = c.startsWith('color(') ? 255 : 1;
    return [v[0] * scale, v[1] * scale, v[2] * scale, v.length > 3 ? v[3] : 1];
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => {
    const f = c.slice(0, 3).map(x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2];
  };
  const ground = e => {
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.push(parse(getComputedStyle(p).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const seen = e => {
    for (let p = e; p; p = p.parentElement) {
      const s = getComputedStyle(p);
      if (s.visibility === 'hidden' || s.display === 'none' || +s.opacity < 0.05) return false;
    }
    return true;
  };
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const problems = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.textContent.trim() || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'TITLE'].includes(e.tagName)) continue;
    if (e.closest('mjx-assistive-mml, .visually-hidden, a.headerlink, .skip-link, #pst-skip-link')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (box.width < 1 || box.height < 1 || !seen(e)) continue;
    const style = getComputedStyle(e);
    const ink = parse(e instanceof SVGElement ? style.fill : style.color);
    const below = ground(e);
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    count += 1;
    if (ratio < (large ? 3 : 4.5)) {
      const key = `${e.tagName}.${e.className.baseVal ?? e.className}`;
      if (!problems.has(key))
        problems.set(key, `${ratio.toFixed(2)} ${key} "${node.textContent.trim().slice(0, 30)}" ` +
          `${style.color} on ${below.map(Math.round).slice(0, 3)}`);
    }
  }
  return { count, problems: [...problems.values()] };
};

// Headings in order, a language, named buttons, loaded pictures, formulas without errors.
probes.structure = () => {
  const problems = [];
  const article = document.querySelector('article');
  const headings = [...article.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => +h.tagName[1]);
  if (headings.filter(l => l === 1).length !== 1) problems.push(`h1: ${headings}`);
  headings.forEach((l, i) => { if (i && l > headings[i - 1] + 1) problems.push(`jump to h${l}`); });
  if (document.documentElement.lang !== 'en') problems.push('no language');
  for (const b of document.querySelectorAll('button'))
    if (!(b.textContent.trim() || b.ariaLabel || b.title)) problems.push('a button without a name');
  for (const i of document.images)
    if (!i.complete || (i.naturalWidth === 0 && getComputedStyle(i).display !== 'none'))
      problems.push(`not loaded: ${i.src}`);
  if (document.querySelector('mjx-merror, .MathJax_Error')) problems.push('a formula with an error');
  return problems;
};
