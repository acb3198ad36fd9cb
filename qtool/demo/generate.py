"""The demo's labelled set: synthetic sentiment sentences, made from our own frames and vocabulary.

Nothing here is a real review: every sentence is synthetic, written for qtool either in full or as a frame with slots.
The set exists so that `qtool demo` can compare a quantized classifier with its float parent without a download; frames
and phrases were chosen so that a small float model gets about nine in ten right, so the score says nothing about how
good a model is elsewhere. `python -m qtool.demo.generate` writes `sentences.jsonl` beside this file, one object a line
with the columns `sentence` and `label` (0 negative, 1 positive).

A label is what a careful reader would say of the whole sentence. Frames are symmetric where English allows it: `=` in
a slot asks for a phrase of the label's own polarity and `!` for the opposite one, so that "anything but {adj!}" is
praise and blame in turn. A seed gives the same bytes on every Python version, because `random.Random(seed).random()`
is the only source of chance and its sequence is guaranteed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

SEED: Final = 20
FILE: Final = Path(__file__).with_name("sentences.jsonl")

# One paragraph a subject, fields `key: phrase / phrase`: `adj` adjectives, `np` noun phrases, `clause` judgements,
# `but` minor points that never outweigh a judgement; + praises, - blames.
_SUBJECTS: Final = """
tense: present | n: film / movie / picture / drama / feature | who: the director / the screenwriter / the lead actor |
  fans: viewers / filmgoers | again: watch it again | went: went to see | span: two hours / a rainy evening
adj+: gripping / tender / inventive / witty / moving / absorbing
adj-: dull / predictable / contrived / clumsy / muddled / lifeless
np+: a luminous lead performance / sly humour / real suspense / a graceful screenplay / dialogue that crackles
np-: a script full of holes / wooden acting / jokes that die on arrival / murky photography / cardboard villains
clause+: the cast finds warmth in every scene / the finale is quietly overwhelming / the camera lingers on faces with
  rare patience / the director trusts the audience to think / the mystery tightens beautifully / every joke hits its
  mark
clause-: the plot sags badly in the middle / the leads have no chemistry whatsoever / the ending makes no sense / the
  gags fall flat / the dialogue is painfully stiff / the camera never stops shaking
but+: the costumes are pretty / the opening shot is lovely / the poster is handsome
but-: the first ten minutes are slow / the title is awkward / the trailer gives too much away

tense: present | n: novel / book / story / debut | who: the author / the novelist / the writer | fans: readers / book
  clubs | again: read it again | went: read | span: a long weekend / a train journey
adj+: lyrical / poignant / clever / vivid / spellbinding / richly imagined
adj-: plodding / pretentious / repetitive / shallow / tedious / implausible
np+: prose that sings / a heroine worth following anywhere / a satisfying mystery / an ending that glows / an eye for
  the telling detail
np-: prose like wet cement / a hero nobody could care about / pages of needless description / a twist anyone could
  guess / a romance without a spark
clause+: the sentences shine without showing off / every character has a beating heart / the last chapter is deeply
  moving / the humour is warm and sly / the two timelines meet beautifully / the pages turn themselves
clause-: the characters are made of cardboard / the plot wanders off and never comes back / the middle third is pure
  padding / the metaphors collapse under their own weight / the ending feels borrowed from a worse book / the narrator
  never stops whining
but+: the cover is gorgeous / the first page is promising / the research is solid
but-: the prologue is heavy going / the print is tiny / a few names are hard to tell apart

tense: past | n: meal / dinner / lunch / tasting menu / brunch | who: the chef / the head waiter / the baker | fans:
  diners / hungry people | again: eat there again | went: sat down to | span: a Friday night / a birthday
adj+: delicious / flavourful / generous / beautifully cooked / memorable / heavenly
adj-: bland / greasy / stodgy / lukewarm / overpriced / tasteless
np+: a broth of astonishing depth / fish cooked to perfection / honest country cooking / spices in perfect balance /
  bread still warm from the oven
np-: rubbery squid / soup straight from a tin / vegetables boiled to death / rice cooked to a paste / waiters who
  looked through us
clause+: the lamb was tender and full of flavour / the waiter was charming and attentive / the sauce was rich and
  silky / the pastry was wonderfully light / the wine list was full of treasures / every flavour sang
clause-: the soup arrived stone cold / the waiter ignored us for forty minutes / the steak was tough as a boot / the
  salad had wilted hours earlier / the fish smelled days old / we found a hair in the rice
but+: the napkins were lovely / the candles were a nice touch / the view was pretty
but-: the chairs were hard / the parking was awkward / the menu was hard to read

tense: past | n: hotel / guesthouse / inn / resort / hostel | who: the manager / the receptionist / the owner | fans:
  guests / families | again: stay there again | went: checked into | span: a wedding weekend / a night between flights
adj+: peaceful / welcoming / comfortable / well run / elegant / spotless
adj-: grubby / noisy / cramped / shabby / dingy / charmless
np+: a heavenly bed / attentive, cheerful staff / a breakfast fit for royalty / a glorious view of the bay / thick
  walls and silent corridors
np-: stains on the sheets / walls like paper / a shower that only dribbled / staff who shrugged / a smell of damp and
  old smoke
clause+: the staff greeted us like old friends / the bed was the best I have slept in for years / the rooms were
  bright and immaculate / the balcony had a glorious view of the sea / the quiet did us a world of good / the porter
  ran through the rain to find us a taxi
clause-: the lift was broken all week / the room smelled of mould / the receptionist argued about our booking / the
  pillows felt like sacks of gravel / the air conditioning rattled all night / something with many legs shared our
  bathroom
but+: the lobby was handsome / the location was handy / the soap smelled nice
but-: the wallpaper was dated / the parking cost extra / the television was tiny

tense: present | n: phone / laptop / tablet / camera / smartwatch | who: the designer / the manufacturer / the maker |
  fans: buyers / owners | again: buy it again | went: bought | span: three hundred dollars / a Christmas bonus
adj+: sturdy / responsive / reliable / intuitive / fast / well made
adj-: flimsy / sluggish / unreliable / fiddly / badly designed / temperamental
np+: superb battery life / a gorgeous screen / a build worthy of twice the price / clear, friendly instructions /
  buttons exactly where you want them
np-: a battery that dies by lunch / a screen that scratches at a glance / a manual written in riddles / a charger that
  overheats / buttons that stick
clause+: the screen is gorgeous even in full sun / the battery life is superb / support was quick, kind and competent
  / the speakers sound rich and clear / setting it up was wonderfully simple / it survived a drop onto concrete
  without a mark
clause-: the battery barely survives the morning / it froze twice on the first day / the hinge snapped within a week /
  support never answered a single message / every update makes it slower / it gets hot enough to worry about
but+: the packaging is beautiful / the colour is lovely / the logo is stylish
but-: the box was hard to open / the manual is thin / the cable is short

tense: past | n: concert / show / recital / gig / performance | who: the conductor / the soloist / the singer | fans:
  listeners / music lovers | again: hear them again | went: went to | span: a summer night / a Saturday evening
adj+: electrifying / thrilling / radiant / spirited / joyous / masterful
adj-: ragged / listless / shambolic / dreary / tuneless / perfunctory
np+: a gorgeous, velvety voice / a rhythm section in perfect step / a thrilling encore / playing of breathtaking
  delicacy / strings that shimmered
np-: sound like gravel in a tin / a singer who forgot the words / drums that drowned everything / tempos that dragged
  their feet / an orchestra on autopilot
clause+: the brass rang out gloriously / the singer gave everything she had / the slow movement was heartbreakingly
  beautiful / the old songs sounded fresh and alive / the conductor shaped every phrase with love / the crowd refused
  to go home
clause-: the sound was mud from start to finish / the singer missed half of her notes / the band turned up an hour
  late and barely apologised / the violins were painfully out of tune / the soloist sounded bored / half the audience
  had left by the interval
but+: the lights were pretty / the programme notes were well written / the seats were comfortable
but-: the seats were hard / the queue at the bar was long / the hall was chilly

tense: present | n: play / production / revival / musical / staging | who: the director / the playwright / the leading
  lady | fans: theatregoers / playgoers | again: see it again | went: went to | span: a winter matinee / a night out
  in town
adj+: riveting / daring / powerful / beautifully acted / touching / sparkling
adj-: stilted / wooden / shrill / toothless / self-indulgent / interminable
np+: timing as crisp as an apple / a set of rare beauty / honest laughter / songs you hum for days / silences that
  speak
np-: speeches that go nowhere / songs nobody will hum / a second act like wading through glue / shouting in place of
  feeling / accents from no known country
clause+: the ensemble moves like one graceful creature / the comic timing is impeccable / every actor gets a moment to
  shine / the lighting is a work of art / the songs are irresistible / the old king breaks your heart
clause-: half the lines are inaudible / the second act drags like a wet coat / the actors seem to be in different
  plays / the director mistakes volume for passion / the jokes were stale a century ago / nobody on stage appears to
  care
but+: the costumes are gorgeous / the programme is glossy / the theatre itself is beautiful
but-: the seats are narrow / the first scene is slow / the wigs are silly

tense: present | n: exhibition / museum / gallery / retrospective / collection | who: the curator / the artist / the
  organiser | fans: visitors / art lovers | again: visit it again | went: visited | span: an afternoon / a rainy
  Sunday
adj+: illuminating / well curated / fascinating / thoughtful / imaginative / enchanting
adj-: confusing / poorly lit / cluttered / uninspired / overcrowded / drab
np+: labels that tell you something / treasures rarely seen in public / guides who love their subject / a tale told
  with care / light that flatters every canvas
np-: labels too small to read / captions full of jargon / screens that do not work / copies passed off as originals /
  a gift shop bigger than the show
clause+: every room holds a delightful surprise / the curator tells a fascinating story / the lighting is a quiet
  masterpiece / the captions are a pleasure to read / the drawings are breathtaking / the children asked to go round
  twice
clause-: half the rooms are closed without warning / the captions might as well be in code / the queue lasts longer
  than the visit / the guards bark at children / the lamps throw glare on every frame / there is more to buy than to
  see
but+: the building is handsome / the cafe is pleasant / the posters are stylish
but-: the coffee is expensive / the entrance is hard to find / the map is confusing

tense: present | n: app / program / service / platform / website | who: the developer / the designer / the publisher |
  fans: users / subscribers | again: sign up for it again | went: signed up for | span: ten dollars a month / a spare
  afternoon
adj+: intuitive / fast / polished / dependable / ingenious / helpful
adj-: buggy / bloated / confusing / sluggish / intrusive / unstable
np+: menus that make sense / search that actually finds things / a layout as clear as glass / support from real people
  / shortcuts for everything
np-: adverts on every page / hidden fees / crashes at the worst moments / error messages in hexadecimal / a maze of
  settings
clause+: the search is quick and clever / it works beautifully on every machine I own / the layout is clean and
  elegant / support is prompt and friendly / it saves me an hour every day / updates only make it smoother
clause-: it crashes whenever I save / the adverts cover half the screen / it lost a month of my notes / cancelling
  took three phone calls / every login fails at least once / the last update broke everything I used
but+: the icon is cute / the colours are pleasant / the animations are smooth
but-: the icon is ugly / the font is small / registration takes a while

tense: past | n: course / class / workshop / lecture series / seminar | who: the teacher / the instructor / the tutor
  | fans: students / beginners | again: take it again | went: enrolled in | span: six Saturdays / a week of annual
  leave
adj+: inspiring / practical / well organised / lively / rewarding / eye-opening
adj-: disorganised / outdated / tedious / shallow / confusing / useless
np+: feedback worth keeping / first-rate notes / exercises that built real skill / a speaker who glowed with
  enthusiasm / patience for every question
np-: slides read aloud word for word / handouts full of errors / homework nobody ever marked / jargon without
  explanation / a speaker who hated questions
clause+: the teacher was funny, patient and wise / the exercises were a joy to solve / the examples were vivid and
  memorable / the notes are a treasure / the tutor gave generous, thoughtful feedback / every session was lively and
  clear
clause-: half the sessions were cancelled / the software never worked / the handouts were ten years out of date / no
  question ever got a straight answer / I learnt next to nothing / the exam had nothing to do with the lessons
but+: the coffee was good / the room was bright / the handbook was nicely bound
but-: the room was cold / the first hour was slow / the projector flickered

tense: present | n: game / sequel / remake / puzzler / adventure | who: the designer / the studio / the lead artist |
  fans: players / gamers | again: play it again | went: played | span: a lazy Sunday / forty hours
adj+: addictive / inventive / charming / satisfying / finely balanced / playful
adj-: repetitive / buggy / soulless / tedious / derivative / broken
np+: puzzles that make you feel clever / controls as smooth as silk / bosses worth the fight / secrets that reward the
  curious / a world begging to be explored
np-: loading screens without end / enemies copied and pasted / controls made of treacle / checkpoints an hour apart /
  a camera that fights you
clause+: every level adds a fresh idea / the controls feel wonderful / the story earns its tears / the riddles are
  clever and fair / the artwork is stunning / the world rewards every detour
clause-: the camera gets stuck behind walls / the same three enemies return for hours / the voice acting is painful /
  it begs for money every ten minutes / the final boss is one long glitch / the tutorial never ends
but+: the box art is beautiful / the title screen is lovely / the theme tune is catchy
but-: the menus are ugly / the opening is slow / the subtitles are tiny

tense: past | n: tour / cruise / excursion / boat trip / safari | who: the guide / the captain / the organiser | fans:
  travellers / tourists | again: book it again | went: joined | span: a holiday / a spring Saturday
adj+: unforgettable / relaxed / magical / well planned / enjoyable / informative
adj-: rushed / chaotic / exhausting / overcrowded / dreary / joyless
np+: a guide who knew every stone / views worth the climb / stories that made us laugh / dolphins at sunset / time to
  linger
np-: hours stuck in traffic / forced stops at souvenir shops / toilets best forgotten / a timetable nobody kept / a
  guide who could not be heard
clause+: the picnic lunch was glorious / the scenery was spectacular / every stop was a delight / the driver handled
  the mountain roads superbly / the small group made strangers into friends / the sunset was breathtaking
clause-: the engine broke down twice / the guide mumbled into a dead microphone / we spent more time in shops than at
  the sights / the cabin stank of diesel / it ran three hours late / the driver texted at the wheel
but+: the seats were comfortable / the leaflet was well designed / the other guests were friendly
but-: the seats were narrow / it drizzled at noon / the meeting point was hard to find
"""

# Phrases that fit every subject.
_COMMON: Final = """
rare+: beguiling / exemplary / transcendent / sublime / winsome / superlative / inimitable / laudable / impeccable /
  exquisite / resplendent / sumptuous / masterly / ravishing / enthralling / stupendous / scintillating
rare-: execrable / lamentable / risible / maladroit / slipshod / atrocious / insufferable / slapdash / ghastly /
  deplorable / lacklustre / abysmal / odious / threadbare / woeful / wretched / vapid / insipid / dismal / amateurish
thing+: triumph / gem / delight / marvel / tour de force / masterstroke / treat / revelation / joy / treasure / breath
  of fresh air
thing-: shambles / fiasco / travesty / dud / letdown / debacle / chore / swindle / mess / damp squib / slog
friend: my sister / my uncle / a colleague / my neighbour / our eldest / an old friend / my dentist / my flatmate / a
  cousin of mine
when: on a wet Tuesday / on our anniversary / after a long drive / with two tired children in tow / on a whim / in the
  last week of August / the day after my exams / during a heatwave / between two shifts
num: three / four / five / six / seven / eight / ten / twenty
chore: clean the gutters / fill in tax forms / queue at the post office / count gravel / iron forty shirts / defrost
  the freezer
"""

_TENSES: Final = {
    "present": {"is": "is", "has": "has", "does": "does", "seems": "seems", "remains": "remains", "makes": "makes"},
    "past": {"is": "was", "has": "had", "does": "did", "seems": "seemed", "remains": "remained", "makes": "made"},
}

# `# kind, sentences of it a label`, then frames: = for both labels, + and - for one.
_FRAMES: Final = """
# plain 90
= {it} {is} {adj=}, {adj=} and {adj=}.
= {clause=}, and {clause=}.
= {clause=}.
= {adj=} and {adj=}, {it} {has} {np=}.
= {it} {seems} {adj=} to me, if only because {clause=}.
= {friend} was right about {it}: {clause=}.
= With {np=} and {np=}, {it} {is} {adj=} from first to last.
+ {who} deserves every bit of praise, because {clause+}.
+ I would happily {again}, for {clause+}.
+ I loved {it}: {clause+}.
+ {when} we {went} {it}, and it {is} {a thing+}.
- {who} owes {fans} an apology, because {clause-}.
- I will never {again}, for {clause-}.
- I regret {it}: {clause-}.
- {when} we {went} {it}, and it {is} {a thing-}.

# negation 46
= Never {adj!}, never {adj!}, {it} {is} {a thing=}.
= {it} {is} not {adj!} but {adj=}, and {clause=}.
= {it} {is} {adj=}, {adj=} and not in the least {adj!}.
= There {is} nothing {adj!} about {it}.
= Nobody could call {it} {adj!}; {clause=}.
+ {it} {is} not without {np+}.
+ I cannot fault {it}: {clause+}.
+ I have nothing but praise for {it}, and {clause+}.
+ You would have to be very hard to please not to enjoy {it}.
+ {it} {is} never {adj-}, never {adj-} and always {adj+}.
- {it} {is} not {adj+}, and it {is} certainly not {adj+}.
- Neither {adj+} nor {adj+}, {it} {is} easily forgotten.
- I can find no reason to {again}.
- You will look in vain for {np+}.
- Not one part of it {is} {adj+}.
= {it} {is} anything but {adj!}: {clause=}.
= {it} {is} anything but {adj!}.
- I cannot honestly say that {clause+}.

# contrast 74
= {but!}. That said, {it} {is} {adj=} and {adj=}.
= While {but!}, {it} {remains} {adj=}, {adj=} and altogether {rare=}.
= Fine, {but!}, but {it} {is} {a thing=}.
= Even if {but!}, {clause=} and {clause=}.
= {clause=} and {clause=}, even if {but!}.
= Although {but!}, {it} {is} {adj=}, and {clause=}.
= {it} {is} {adj=} and {adj=}, though to be fair {but!}.
+ {but-}, I suppose, and I still loved it: {clause+}.
+ {but-}, but {clause+}, and I would gladly {again}.
+ {but-}, yet all is forgiven because {clause+}.
- {but+}, I suppose, and I still hated it: {clause-}.
- {but+}, but {clause-}, and I will not {again}.
- {but+}, yet that is no consolation when {clause-}.

# understatement 27
+ {it} {is} not half bad: {clause+}.
+ {it} gave {fans} little to complain about: {clause+}.
+ {it} {is} no small achievement: {clause+}.
+ {it} {is} rather more {adj+} than I had dared to hope.
+ {fans} could do a good deal worse than {it}: it {is} {adj+}, and {clause+}.
+ I will say only this: {it} {is} {adj+}, and {clause+}.
+ {it} {is} hardly the worst way to spend {span}.
- {it} {is} not exactly {adj+}.
- {it} gave {fans} little to smile about: {clause-}.
- {it} leaves some room for improvement, given that {clause-}.
- Shall we say that {who} was having an off day, since {clause-}?
- {it} {is} rather less {adj+} than one might wish.
- The best I can say for {it} is that some are even worse.
- To call {it} {adj+} would be generous.

# question 44
= What else would you call {a n} with {np=} but {a thing=}?
= {is} it {adj=}? Yes, and {adj=} as well: {clause=}.
+ Who could resist {a adj+} {n} with {np+}?
+ When did {a n} last make {fans} this happy?
+ Would I {again}? In a heartbeat.
+ How could anyone not love {it}, when {clause+} and {clause+}?
+ What more could {fans} ask for than {np+} and {np+}?
= {is} it {adj!}? Not in the least: it {is} {adj=}, and {clause=}.
- Who needs {a adj-} {n} with {np-}?
- Why would anyone pay for {np-}?
- Was it really too much to ask for {np+}?
- Did nobody notice that {clause-}?
- What is the point of {np+} when {clause-}?
- Would I {again}? Not for all the money in the world.

# comparison 26
= Of the {num} I have tried, {it} {is} easily the most {rare=}.
= {it} {is} {adj=} and {adj=}; the one {friend} recommended {is} {adj!} by comparison.
+ {it} {is} better than it {has} any right to be: {clause+}.
+ Even {fans} with impossible standards will love {np+}.
+ {it} {is} twice as {adj+} as the one {friend} keeps praising.
+ Never before have I come across {a n} half as {adj+}.
+ {it} makes every rival look {adj-}.
- {it} {is} worse than it {has} any right to be: {clause-}.
- Even {fans} with modest expectations deserve better than {np-}.
- I would rather {chore} than {again}.
- {it} {is} half as {adj+} as the one we tried last year.
- I would swap all of it for {np+}.
- {it} makes every rival look {adj+}.

# rare 84
= {a rare=} {n} with {np=}.
= {it} {is} {rare=}, {adj=} and, in the end, {rare=}.
= {who} has given us {a rare=}, {adj=} {n}.
= In short, {a thing=}: {clause=}.
= {it} {is} {a thing=}, and {a rare=} one at that.
= What {a rare=} {n} this {is}, and what {a thing=}!
= The most {rare=} {n} of the season, with {np=} and {np=}.
= There {is} something {rare=} about {it}: {clause=}.
= {rare=} and {adj=}: no other words will do for {it}.
= {it} {is} {rare=} rather than {rare!}, whatever {friend} says.

# short 64
= {a adj=} {n}.
= {adj=} and {adj=}.
= {a rare=} {n}.
= {np=}, {np=}.
= {np=}.
= {adj=} from beginning to end.
= {a thing=}, frankly.
= {a adj=}, {adj=} {n}.
= {a thing=} for {fans}.

# long 64
= I know that {friend} disagrees, and that plenty of {fans} insist that {clause!}, but to me {it} {is} {adj=} and \
{adj=}, chiefly because {clause=}.
= Before you listen to {friend}, who has been telling everybody that {clause!}, remember that {clause=}, that \
{clause=}, and that the {n} {is}, by any fair measure, {adj=}.
= {when}, {friend} and I {went} {it}, and although {but!}, what stayed with us is that it {is} {adj=} and {adj=} and \
that {clause=}.
= {clause=}, {clause=}, and, as if that were not enough, {clause=}, so that all {num} of us agreed on {a rare=} {n}.
= {num} of us {went} {it} {when}, none of us knowing what to expect, and we all came away saying that it {is} {a \
thing=}, that it {is} {adj=}, and that {clause=}.
+ Critics were quick to point out that {but-}, and they are not wrong, yet they forget to mention that {clause+}, \
which is why {friend} and I came away so happy.
- Critics were quick to point out that {but+}, and they are not wrong, yet they forget to mention that {clause-}, \
which is why {friend} and I came away so cross.

# reversal 44
= I expected {np!} and got {np=}.
+ {friend} had warned me about {np-}; what I found was {a adj+}, {adj+} {n} with {np+}.
- {friend} had raved about {np+}; what I found was {a adj-}, {adj-} {n} with {np-}.
= {it} could so easily have been {adj!}; instead it {is} {adj=}, {adj=} and {adj=}.
+ I had sworn never to {again}, and I am so glad that {friend} changed my mind.
+ I take back every doubt I had about {it}: {clause+}.
+ I came to scoff and left in love with {a adj+} {n}.
+ {friend} called it {adj-}; I call it {a thing+}, and {clause+}.
+ It might have been {adj-} in lesser hands; here {clause+}.
- It might have been {adj+} in better hands; here {clause-}.
- {it} wanted to be {adj+} and ended up {adj-}.
- I had so looked forward to {np+}, and what a comedown it {is}.
- I take back every kind word I said about {it}: {clause-}.
- {friend} called it {adj+}; I call it {a thing-}, and {clause-}.

# irony 20
+ Be warned: {it} {is} so {adj+} that every other {n} will disappoint you.
+ I hate to admit it, but {it} {is} {adj+} and {adj+}.
+ Against my will and my better judgement, I found {it} {adj+}.
+ I tried to dislike {it}, I really did, but {clause+}.
+ Curse {who} for {a n} so {adj+} that I forgot the time.
- Just what I always wanted: {np-}.
- Bravo: {clause-}, and they charge extra for it.
- I wish I could share the excitement, but {clause-}.
- Congratulations to {who}, who has managed to make {a adj-} {n} out of {np+}.
- Oh, wonderful: {np-}.
- Come for {np-}, stay because the door is locked.

# mixed 26
= It is true that {clause!}, and yet on the whole {it} {is} {adj=} and {adj=}.
= {but!} and {but!}, but {clause=}, and that is what counts.
= On the one hand, {but!}; on the other, {clause=} and {clause=}, and the second hand wins easily.
+ Not perfect, since {but-}, but {adj+} where it counts.
+ I hesitated, since {but-}, but {clause+}, which settled the matter in its favour.
- Not hopeless, since {but+}, but {adj-} where it counts.
- I hesitated, since {but+}, but {clause-}, which settled the matter against it.
- {but+}, and I would still like my money back, because {clause-}.
"""

# Sentences written out in full, + praise and - blame.
_WRITTEN: Final = """
+ The plot sags, but the cast carries it. / Not a frame of it is wasted, and not a tear of mine was forced.
+ If this is what a first feature looks like, I can hardly wait for the second. / Strangers were hugging in the aisles.
+ Grief has seldom been written with so little fuss and so much truth. / We had booked two nights and stayed for five.
+ It took me a week to read, because I kept going back to savour the sentences. / Worth every penny. / A quiet triumph.
+ A small, funny, generous book about large sorrows. / The dumplings alone are reason enough to move to this town.
+ Nobody spoke for ten minutes, which at our table is the highest compliment. / Brave, bruising and unexpectedly tender.
+ Hardly the worst evening of my life: I had two desserts and regret neither. / I was utterly charmed. / Do not miss it.
+ It is no palace, but I slept better there than I have in years. / My old one cost twice as much and did half as well.
+ It does one thing only, and it does it beautifully. / I do not even like jazz, and I was enchanted. / It grew on me.
+ She sang the last verse without a microphone, and it was the loveliest sound I have ever heard. / What a find!
+ My ears are still ringing, and I would not have it any other way. / It makes the dreariest part of my job a pleasure.
+ The understudy went on at an hour's notice and stole the evening. / The guide's love of those hills is infectious.
+ It is silly, it is far too loud, and I grinned until my face hurt. / Go, and take friends. / I have no complaints.
+ We meant to stay an hour and had to be asked to leave at closing time. / Bliss from start to finish. / Simply a joy.
+ A treasure house, and the warmest welcome of any museum in the city. / I would not change a thing. / Money well spent.
+ Not once in two years has it lost a single note of mine. / Five stars, no hesitation. / My new favourite.
+ For the first time in my life, statistics made me laugh for the right reasons. / Nothing short of magnificent.
+ Not an easy course, but the most rewarding one I have ever taken. / Far better than we feared. / A pleasant surprise.
+ I said one more level at nine; the birds were singing when I stopped. / It wins you over.
+ It looks like nothing, costs next to nothing, and has brought us hours of joy.
+ It rained from dawn to dusk, and it was still the best day of the whole holiday.
+ A warm, wise and very funny film about getting old without getting dull.
+ Gorgeous to look at, thrilling to listen to, and over far too soon.
+ The best seafood I have eaten anywhere, served by the happiest waiters in the harbour.
+ From the lemon tart to the last espresso, everything was superb.
+ This is the rare sequel that deepens everything we loved about the original.
+ Clear, kind and endlessly patient, she is the best teacher I have ever had.
+ Our little balcony above the bay was perfect, and so was the coffee.
+ I laughed, I cried, and I booked again for Thursday. / A haunting, beautifully judged staging with a magnificent lead.
+ It is fast, quiet, handsome and a pleasure to carry. / Rarely has a museum made such good use of so small a space.
+ The orchestra played with such tenderness that I held my breath.
+ The puzzles are ingenious, the music is lovely, and my children adore it.
+ Crisp, clever and generous, this little program deserves a wide audience.
- It has everything except a reason to exist. / The trailer contains both of the good jokes. / Save your money.
- By the second hour I was admiring the exit signs. / You can see the budget in every shot and an idea in none of them.
- The director's talent, so evident in his early work, is nowhere to be found here. / Avoid at all costs.
- I have read shopping lists with more suspense. / The menu promised a journey; we should have stayed at home.
- A promising premise, buried alive under six hundred pages of throat-clearing. / A crashing bore. / What a letdown!
- I finished it only because the flight was long and there was nothing else to read. / I want my evening back.
- The waiter asked how everything was and left before we could tell him. / I got more history out of the taxi driver.
- For that price I expected more than three peas and a smear. / The best thing about our room was the door out of it.
- The photographs on the website must have been taken in another decade, or at another hotel. / Not worth the bother.
- The third replacement lasted almost as long as the first. / It makes an elegant paperweight and very little else.
- They played the hits as though reading out a bus timetable. / Eleven rooms, four of them open, none of them labelled.
- I have heard better harmonies from the cats behind our kitchen. / Everything I learnt there I had to unlearn at work.
- People cheered loudest when the lights came up to let them leave. / Dead on arrival. / I expected so much more.
- Three hours long, with two intervals in which to reconsider. / Style without substance. / All sizzle, no steak.
- Somewhere inside this concept there is a good play asking to be let out. / A wasted opportunity. / It left me cold.
- It takes real determination to make dinosaurs boring, and they have managed it. / Nobody should pay for this.
- It asks for my location, my contacts and my patience, and has lost all three. / Too little, too late.
- The new version solves a problem nobody had by creating six that everybody has. / Thin gruel indeed.
- I paid four hundred pounds to watch a man search for his own slides. / Beneath everyone involved. / It wears you down.
- I have had more fun waiting for it to load than playing it. / One star is generous.
- It is pretty in the way that a screensaver is pretty, and about as thrilling.
- We saw the famous waterfall for four minutes and the famous carpet shop for two hours.
- A tired, cynical sequel that insults the people who loved the first one.
- Bloodless direction and a leaden script drain all the life from a good idea.
- The chicken was dry, the rice was burnt, and the bill was a joke.
- Ugly, cramped and overpriced, with a carpet that stuck to our shoes.
- A dreary slog through other people's holidays, told without wit or insight.
- It is slow, it is noisy, and it broke within a month.
- The sound was terrible and the singer seemed bored by her own songs.
- Confused, humourless and badly lit, the whole evening felt like a punishment.
- The rooms are dark, the labels are useless, and the staff are rude.
- An ugly, confusing mess of a website that fails at the one thing it is for.
- He mumbled through two hours of dull slides and learnt nobody's name.
- Lazy level design and a stupid story make this a depressing sequel.
- We were herded, hurried and overcharged, and the boat was filthy.
- The worst breakfast of my life, in the saddest dining room in the country.
"""

_SLOT: Final = re.compile(r"\{(a )?([a-z]+)([=!+-]?)\}")
_CONTENT: Final = re.compile(
    r"\b(?!(?:that|with|from|like|have|than|them|they|were|what|when|more|half|into|every|never|could|would|nobody)\b)"
    r"[a-z]{4,}"
)
_T = TypeVar("_T")


class Labelled(NamedTuple):
    """One sentence of the set: its linguistic `kind`, its text, and 1 for praise or 0 for blame."""

    kind: str
    sentence: str
    label: int


def sentences(seed: int = SEED) -> list[dict[str, str | int]]:
    """The rows of the set in file order: `sentence` (3 to 40 words, unique) and `label` (0 negative, 1 positive).

    All of them are synthetic. The same seed gives the same rows on every Python version and platform.
    """
    return [{"sentence": row.sentence, "label": row.label} for row in labelled(seed)]


def labelled(seed: int = SEED) -> list[Labelled]:
    """The rows of `sentences` with the kind of difficulty each was written for, as many of either label."""
    chance = random.Random(seed)
    rows = [Labelled("written", text, label) for text, label in _written()]
    seen = {_normal(row.sentence) for row in rows}
    writer = _Writer(chance)
    for kind, count, frames in _kinds():
        for label in (0, 1):
            rows += _fill(writer, kind, frames[label], count, label, seen)
    return _shuffled(rows, chance)


def main() -> None:
    """Writes `sentences.jsonl` beside this file."""
    FILE.write_bytes(encode(sentences()))


def encode(rows: Sequence[dict[str, str | int]]) -> bytes:
    """The bytes of the JSON Lines file with these rows: UTF-8, one object a line, every line ended."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


class _Deck:
    """Deals phrases in shuffled rounds, so that all of them are used about equally often."""

    def __init__(self, phrases: Sequence[str], chance: random.Random) -> None:
        self._phrases, self._chance, self._left = phrases, chance, list[str]()

    def deal(self, avoid: set[str]) -> str:
        """The next phrase that shares no content word with `avoid`, or simply the next where all of them do."""
        if not self._left:
            self._left = _shuffled(self._phrases, self._chance)
        free = [phrase for phrase in self._left if not _content(phrase) & avoid]
        phrase = (free or self._left)[0]
        self._left.remove(phrase)
        return phrase


class _Writer:
    """Fills frames; subjects, nouns and phrases all come from decks."""

    def __init__(self, chance: random.Random) -> None:
        self._common = {key: _Deck(phrases, chance) for key, phrases in _table(_COMMON).items()}
        self._subjects = [
            {key: _Deck(phrases, chance) for key, phrases in _table(block).items()}
            for block in _SUBJECTS.strip().split("\n\n")
        ]
        self._turns = _Deck([str(index) for index in range(len(self._subjects))], chance)

    def write(self, frame: str, label: int) -> str:
        """The frame with every slot filled for this label, as a sentence with capitals in place."""
        decks = self._common | self._subjects[int(self._turns.deal(set()))]
        used: set[str] = set()
        words = dict(_TENSES[decks["tense"].deal(set())])
        words["n"] = decks["n"].deal(set())
        words["it"] = f"the {words['n']}"

        def fill(slot: re.Match[str]) -> str:
            article, name, polarity = slot.groups()
            text = words.get(name) or decks[name + _sign(polarity, label)].deal(used)
            used.update(_content(text))
            return f"{_article(text)} {text}" if article else text

        return _capitals(_SLOT.sub(fill, frame))


def _fill(writer: _Writer, kind: str, frames: list[str], count: int, label: int, seen: set[str]) -> list[Labelled]:
    """`count` new sentences of one kind and label, the frames taken in turn; `seen` grows by them."""
    rows: list[Labelled] = []
    turn = 0
    while len(rows) < count:
        sentence = writer.write(frames[turn % len(frames)], label)
        turn += 1
        if _normal(sentence) not in seen and 3 <= len(sentence.split()) <= 40:
            seen.add(_normal(sentence))
            rows.append(Labelled(kind, sentence, label))
    return rows


def _kinds() -> list[tuple[str, int, tuple[list[str], list[str]]]]:
    """Every kind: its name, how many sentences of either label, and the frames of label 0 and of label 1."""
    kinds: list[tuple[str, int, tuple[list[str], list[str]]]] = []
    for block in _FRAMES.strip().split("\n\n"):
        head, *lines = block.splitlines()
        _, name, count = head.split()
        frames = tuple([line[2:] for line in lines if line[0] in signs] for signs in ("=-", "=+"))
        kinds.append((name, int(count), (frames[0], frames[1])))
    return kinds


def _written() -> list[tuple[str, int]]:
    """The sentences written out in full, each with its label."""
    lines = _WRITTEN.strip().splitlines()
    return [(text, int(line[0] == "+")) for line in lines for text in line[2:].split(" / ")]


def _table(block: str) -> dict[str, list[str]]:
    """A block of `key: phrase / phrase` fields, ended by ` | ` or a line's end; an indented line goes on."""
    fields = re.split(r" \| |\n", block.strip().replace("\n  ", " "))
    pairs = (field.split(": ") for field in fields)
    return {key: phrases.split(" / ") for key, phrases in pairs}


def _sign(polarity: str, label: int) -> str:
    """The key's suffix for a slot's polarity mark: `=` the label's own, `!` the opposite one."""
    return {"=": "-+"[label], "!": "+-"[label]}.get(polarity, polarity)


def _content(phrase: str) -> set[str]:
    """The words that would sound repeated, or contradicted, within one sentence."""
    return {word.rstrip("s") for word in _CONTENT.findall(phrase)}


def _article(text: str) -> str:
    return "an" if re.match(r"(?!use|uni[^mn])[aeiou]|honest|hour", text) else "a"


def _capitals(text: str) -> str:
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _normal(sentence: str) -> str:
    """Lower case without punctuation, for telling two sentences apart."""
    return " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))


def _shuffled(items: Sequence[_T], chance: random.Random) -> list[_T]:
    """A Fisher-Yates shuffle on `chance.random()` alone; `random.shuffle` may change between Python versions."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(chance.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


if __name__ == "__main__":
    main()
