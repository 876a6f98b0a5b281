"use strict"
// Below each result, the paragraph of its page that has most of the words. Nothing is fetched: a browser refuses that to a
// page that was opened from a folder.
const wanted = (new URLSearchParams(location.search).get("q") || "").toLowerCase().split(/[^\p{L}\p{N}_]+/u).filter(w => w)
const count = text => wanted.filter(w => text.toLowerCase().includes(w)).length

function excerpt(text) {
  const at = Math.min(...wanted.map(w => text.toLowerCase().indexOf(w)).filter(i => i >= 0), text.length)
  const from = text.length < 240 || at < 120 || at == text.length ? 0 : text.lastIndexOf(" ", at - 80) + 1
  const cut = text.slice(from, from + 240)
  return (from ? "… " : "") + (from + 240 < text.length ? cut.slice(0, cut.lastIndexOf(" ")) + " …" : cut)
}

function explain(item) {
  const [page, place] = item.querySelector("a").getAttribute("href").split("#")
  const name = page.replace(/\.html$/, "")
  const found = prose[`${name}#${place}`] || prose[name]
  if (!found || item.querySelector("p.context")) return
  const best = found.reduce((a, b) => count(b) > count(a) ? b : a)
  const line = document.createElement("p")
  line.className = "context"
  for (const part of excerpt(best).split(/([\p{L}\p{N}_]+)/u)) {
    const bold = wanted.some(w => part.toLowerCase().startsWith(w))
    line.append(bold ? Object.assign(document.createElement("b"), {textContent: part}) : part)
  }
  item.append(line)
}

document.addEventListener("DOMContentLoaded", () => {
  const results = document.getElementById("search-results")
  const look = () => results.querySelectorAll("ul.search > li").forEach(explain)
  new MutationObserver(look).observe(results, {childList: true, subtree: true})
  look()
})
