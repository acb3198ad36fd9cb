"""CSS of figures and page. No child selectors: what lies in `<style>` must mean the same to HTML and to XML."""

FIGURES = """
svg{display:block;font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow:visible}
svg text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
svg .axis{font-size:11px;fill:var(--soft)}
svg .small{font-size:10px}
svg .tick{font-size:10.5px;fill:var(--soft)}
svg .heading{font-size:14px;font-weight:600;fill:var(--ink)}
svg .panel{font-size:12px;font-weight:600;fill:var(--ink)}
svg .value{font-size:9.5px}
svg .label{font-size:12px;font-weight:600}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.axis-line{stroke:var(--soft);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.reference{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:7 4}
.leader{stroke:var(--line);stroke-width:1;fill:none}
.none{fill:none;stroke:var(--line)}
.bars{fill:var(--log);fill-opacity:.28}
.curve{fill:none}
path.member{stroke:var(--prune);stroke-width:.7;stroke-opacity:.5}
path.all{stroke:var(--prune);stroke-width:2}
text.curve{fill:var(--prune)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.dot{stroke-width:1.6}
.band{fill-opacity:.13;stroke:none}
.line.open{stroke-dasharray:5 4;stroke-width:1.5}
"""

for _name in ("log", "linear", "prune", "best", "ink"):
    FIGURES += (
        f".line.c-{_name}{{stroke:var(--{_name})}}.dot.c-{_name}{{fill:var(--{_name});stroke:var(--card)}}"
        f".band.c-{_name}{{fill:var(--{_name})}}svg text.c-{_name}{{fill:var(--{_name})}}"
        f".dot.open.c-{_name}{{fill:var(--card);stroke:var(--{_name})}}"
    )

PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:56px 28px 72px}
h1,h2,.finding{font-family:"Iowan Old Style","Charter","Bitstream Charter","Sitka Text",Cambria,Georgia,serif}
h1{font-size:clamp(30px,5vw,46px);line-height:1.1;letter-spacing:-.015em;margin:.15em 0 .5em;overflow-wrap:anywhere}
h2{font-size:clamp(22px,3vw,29px);line-height:1.22;letter-spacing:-.01em;margin:.15em 0 .4em;max-width:28em;
font-weight:600;text-wrap:balance}
h3{font-size:14px;margin:30px 0 2px}
p{margin:0 0 .8em}
.kicker{font-size:12px;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);font-weight:600;margin:0}
.finding{font-size:clamp(19px,2.3vw,23px);line-height:1.48;max-width:40em}
.finding.more{font-size:clamp(16px,1.9vw,18px);color:var(--soft)}
.lead{max-width:46em;color:var(--soft)}
.note{max-width:52em;color:var(--soft);font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:0;margin-top:34px;
border-top:2px solid var(--ink)}
.tile{padding:16px 18px 14px 0}
.tile p{margin:0}
.tile .label{font-size:13px;font-weight:600}
.tile .value{font-size:clamp(27px,3.4vw,36px);line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile .remark{font-size:13px;line-height:1.4;color:var(--soft)}
section{margin-top:72px}
.figures{display:grid;gap:18px;margin:14px 0 6px}
.figures.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
.figures.triple{grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr))}
.figures.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,235px),1fr));gap:22px 20px}
.figures.wide{grid-template-columns:1fr}
figure{margin:0;min-width:0}
.pair figure,.triple figure,.wide figure{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px 16px 12px}
figcaption{font-size:14px;font-weight:600;margin:0 0 10px}
figure svg{width:100%;height:auto}
.cell:hover rect{stroke:var(--ink);stroke-width:1.5}
details{margin-top:14px;border-top:1px solid var(--line);padding-top:10px}
summary{cursor:pointer;font-size:14px;font-weight:600;color:var(--log)}
summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--log);outline-offset:3px;border-radius:3px}
.scroll{overflow-x:auto;margin:10px 0 4px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:5px 14px 5px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
th.text,td.text{text-align:left}
tbody tr:hover td{background:var(--card)}
footer{margin-top:84px;border-top:2px solid var(--ink);padding-top:14px}
footer dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px 28px;margin:14px 0 22px}
dt{font-size:12px;color:var(--soft)}
dd{margin:0;font-size:14px;overflow-wrap:anywhere}
@media (max-width:560px){.pair svg .tick,.pair svg .axis{font-size:13px}.pair svg .label{font-size:13.5px}
main{padding:32px 16px 48px}section{margin-top:52px}
.pair figure,.triple figure,.wide figure{padding:12px 10px 10px}}
@media print{body{background:none;font-size:11pt}main{max-width:none;padding:0}section{margin-top:26pt}
figure,.tile,tr{break-inside:avoid}h2,h3{break-after:avoid}.figures.small{grid-template-columns:repeat(3,1fr)}
.figures.pair{grid-template-columns:1fr 1fr}.figures.triple{grid-template-columns:repeat(3,1fr)}
.bars,.band,rect,circle{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
@media (prefers-reduced-motion:no-preference){summary{transition:color .15s}}
"""
