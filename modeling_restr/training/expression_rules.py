"""
Which expressions stay true when their image is mirrored, cropped or recoloured, judged by their words.

The rules are for English. In doubt they reject the change, so that no sentence becomes untrue. They cannot know what
the words do not say, such as that a brand's name on a shirt is reversed in a mirrored image.
"""

import difflib
import re
from functools import cache


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SIDE_PAIRS = {
    "left": "right",
    "leftmost": "rightmost",
    "leftest": "rightest",
    "lefthand": "righthand",
    "lefthanded": "righthanded",
    "leftside": "rightside",
    "leftward": "rightward",
    "leftwards": "rightwards",
    "lefty": "righty",
    "lhs": "rhs",
    "lft": "rt",  # "lt" is light as often as left
}
_OTHER_SIDE = _SIDE_PAIRS | {right: left for left, right in _SIDE_PAIRS.items()}
# Names that other words are compared with. Shorter ones are too close to words such as "last" and "art".
_SIDE_NAMES = ["left", "right", "leftmost", "rightmost", "lefthand", "righthand", "leftside", "rightside"]
# Words that contain or resemble such a name but are not typos. Any other such word may be one ("lwft", "rigth"), or two
# words in one ("theleft").
_NOT_SIDES = _word_set(
    """
    alright bright brighten brighter brightest brightly brights eft eight fight freight frightened frightening hight
    leaf leftover leftovers lent lest let lets lift light loft might night outright rig sight straight tight upright
    """
)

# After these words "left" and "right" are sides, except for "on" in "lamp on right behind the bed" ...
_PLACE_BEFORE = re.compile(r"\b(?:on|far|(?:on|to|at|in|from|of|towards?)\s+the(?:\s+(?:very|far|extreme))?)[\s-]+$")
_ON_BEFORE = re.compile(r"\bon[\s-]+$")
_COUNT_BEFORE = re.compile(r"(?:\b(?:first|second|third|fourth|fifth)|\d(?:st|nd|rd|th))\b.*\b(?:from|to)\s+$")
# ... and so they are next to any other word but these, with which "left" may mean what remains and "right" may mean
# "just": "slice left", "bag left behind", "man right in front".
_UNCLEAR_BEFORE = _word_set(
    """
    all any are be been being bit bits few food had has have he he's i is it it's its little more much nothing one ones
    only s she she's some that that's thats there there's they up was we were what what's whats which who who's whos you
    you're two three four five six seven eight nine ten eleven twelve
    apple apples bagel banana bananas beer bite bites bread broccoli bun burger cake candle candles carrot carrots coffee
    cookie cookies crust dish dog donut donuts doughnut doughnuts drink egg eggs fries fruit half hotdog hotdogs meal meat
    orange oranges part pasta pastry pie piece pieces pizza portion portions rice salad sandwich slice slices soup stuff
    veggies water wine
    """
)
_UNCLEAR_AFTER = _word_set(
    """
    a about above across after against ahead alone along alongside amid among amongst an around as at away before behind
    below beneath beside besides between beyond blank by close dab dead down empty for from hanging her here his in inside
    into its laying lying my near next off on onto open opposite our out outside past sitting smack square standing that
    the their there this through to toward towards unattended uncovered under underneath uneaten unfinished until
    untouched upon when where within your
    """
)
_NEVER_A_SIDE_BEFORE = _word_set("amount angle angled angles kind now over overs size time up way")
# The one use of "right" that certainly is not a side: "standing right behind".
_ADVERB_BEFORE = re.compile(r"\b(?:sits?|sitting|seated|stands?|standing|parked|is|are|was|were)\s+$")
_ADVERB_AFTER = re.compile(
    r"\s+(?:next\s+to|behind|in\s+front\s+of|above|below|under|underneath|beneath|beside|(?:in\s+)?between|on\s+top\s+of"
    r"|in\s+the\s+(?:middle|center|centre))\b"
)

_HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_HOUR_NAMES = "|".join(_HOURS)
_CLOCK_POSITION = re.compile(
    rf"(?<![\w:.])(1[0-2]|[1-9]|{_HOUR_NAMES})(?::00\b|[\s-]*o'?[\s-]?clock\b)(?!\s*[ap]\.?m)"
)
_CLOCK_WORDS = _word_set("clock clocks digital time watch watches")  # with these, an hour is a time, not a position

# Sentences that become untrue without naming a side: text in a mirrored image is reversed ...
_TEXT_WORDS = _word_set(
    """
    brand branded caption digit digits initials inscribed inscription label labeled labelled labels letter lettered
    lettering letters license logo logos marked name named names number numbered numbers numeral numerals read reading
    reads said saying say says sign signs slogan spell spelled spelling spells text texts title titled word wording
    words write writing writings written wrote
    """
)
_UNPRINTED_CAPITALS = {"RV", "SUV", "TV"}  # other words in capitals may be printed on a shirt
# ... and some words imply a side or an order.
_HANDED_WORDS = _word_set(
    """
    after anticlockwise base baseman basemen before clockwise counterclockwise lef lt port quadrant rite shortstop
    southpaw starboard
    east eastern eastward ne northeast northwest nw se southeast southwest sw west western westward
    """
)
_UNMIRRORABLE = re.compile(
    r"[\"`#<>\\|]|(?<!\w)'\w"  # quotes and arrows
    r"|\d(?!\d*(?:st|nd|rd|th)\b)"
    # Letters that look different in a mirror, and "s" unless it is a remnant of "'s".
    r"|(?<![\w'])[bcdefgjklnpqrz](?![\w'])|\b(?:an?|the|with|of)\s+s\b|\b[a-z][\s-]shape"
    rf"|\b(?:bus|car|horse|jersey|player|rider|shirt|train|uniform)\s+(?:{_HOUR_NAMES})\b"
    rf"|\b(?:{_HOUR_NAMES})\W*(?:and|or|to)?\W*~"  # "two or three o'clock", after "three o'clock" became "~~~"
    r"|right[\s-]?side[\s-]?up|\b(?:driver|passenger)(?:'?\s?s)?\s+side|\b(?:left|right|lft|rt)\s*\?"
    r"|\bnext\b(?!\s+to\b)"  # "the next one" counts from a side
)
_SIDE_WORDS = "|".join(_OTHER_SIDE)
# People count from the left unless they say where they start, with the ordinal or for the whole sentence.
_ORDINAL = re.compile(
    r"\b(?:beginning|last|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|\d+(?:st|nd|rd|th))\b"
    r"(?!\s+(?:row|rows|shelf|rack|floor|story|tier|level|layer|deck|\w+est)\b)"
)
_COUNTED = re.compile(
    rf"[\s-]+(?:{_SIDE_WORDS})\b"
    r"|(?:\s+[a-z'-]+){0,4}?\s+(?:"
    rf"(?:from|to|on)(?:\s+the)?(?:\s+(?:very|far))?\s+(?:{_SIDE_WORDS})\b(?![\s-]+(?:hand[\s-]+)?side)"
    r"|from(?:\s+the)?(?:\s+very)?\s+(?:top|bottom|front|back|rear|camera|viewer|us)\b)"
)
_READING_ORDER = re.compile(r"\b(?:left[\s-]+to[\s-]+right|right[\s-]+to[\s-]+left)\b")

# Words of place, order, number, comparison, relation and visibility.
_FRAME_WORDS = _word_set(
    """
    above across adjacent after against ahead all alone along alongside among amongst another around away back
    background barely before behind below beneath beside besides between beyond big border both bottom bunch by center
    central centre close corner couple cropped crowd cut different distance distant each edge else end entire every
    except far following foreground frame front full fully giant group half herd hidden huge image inner inside large
    leading least less line little lone lower many medium mid middle more most near next obscured only opposite other
    others outer outside over pair partial partially partly photo photograph pic picture pile portion rear remaining
    rest row same seen several short showing side similar single small stack surrounded tall than tiny top under
    underneath upper visible whole
    bigger brighter closer darker farther fatter further higher larger lighter longer narrower nearer older shorter
    skinnier smaller taller thicker thinner wider younger
    l r north south two three four five six seven eight nine ten eleven twelve
    """
)
_SUPERLATIVE = re.compile(r"(?!(?:almost|chest|crest|forest|guest|harvest)$)\w{2,}(?:est|most)")

COLOR_WORDS = _word_set(
    """
    amber aqua beige black blond blue bronze brown brunette burgundy color colour copper cream crimson cyan fuchsia gold
    gray green grey hazel indigo ivory khaki lavender lilac lime magenta maroon mauve navy neon olive orange peach pink
    purple rainbow red rose rust salmon silver tan teal turquoise violet white yellow
    """
)
_COLOR = re.compile(rf"\b(?:dark|light|multi|off)?(?:{'|'.join(sorted(COLOR_WORDS))})")

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def mirror_expression(text: str) -> str | None:
    """
    The expression that means the same in the mirrored image, or `None` in doubt.

    Sides ("left", "rightmost", "rt") and positions on a clock ("3 o'clock") are swapped and keep their case. Mirroring
    twice restores the text. "Right" stays if it certainly is an adverb ("standing right behind").

    `None` is returned for sentences that are ambiguous ("man right in front", "slice left"), have a typo in such a word,
    are about text, letters or numbers, count without saying from which side ("second guy"), or have words that imply a
    side (points of the compass, "third base").
    """
    plain = text.replace("\u2019", "'")
    if not plain.isascii() or "~" in plain or _may_quote(plain):
        return None
    lowered = plain.lower()
    hours = list(_CLOCK_POSITION.finditer(lowered))
    lowered = _CLOCK_POSITION.sub(lambda position: "~" * len(position[0]), lowered)
    words = list(_WORD.finditer(lowered))
    sides = [word for word in words if word[0] in _OTHER_SIDE]
    if _is_unmirrorable(lowered, {word[0] for word in words}, has_hour=bool(hours)):
        return None
    meanings = [_means_side(lowered, *word.span()) for word in sides]
    if None in meanings:
        return None
    swaps = [(hour.span(1), _mirror_hour(hour[1])) for hour in hours]
    swaps += [(word.span(), _OTHER_SIDE[word[0]]) for word, is_side in zip(sides, meanings) if is_side]
    return _swap(text, sorted(swaps))


def needs_whole_image(text: str) -> bool:
    """
    Whether a crop could make the expression untrue or ambiguous. This is so if it has a word of place, order, number,
    comparison, relation or visibility, or one that may be a typo of "left" or "right".
    """
    lowered = text.lower()
    words = _WORD.findall(lowered)
    return (
        bool(re.search(r"\d", lowered) or _CLOCK_POSITION.search(lowered) or _ORDINAL.search(lowered))
        or not (_FRAME_WORDS | _HANDED_WORDS).isdisjoint(words)
        or any(word in _OTHER_SIDE or _resembles_side(word) or _SUPERLATIVE.fullmatch(word) for word in words)
    )


def names_color(text: str) -> bool:
    """Whether a word is in `COLOR_WORDS` or starts with one of them ("reddish", "darkblue", "goldfish")."""
    return bool(_COLOR.search(text.lower()))


def _may_quote(text: str) -> bool:
    """Whether single words are in capitals: they may quote text in the image."""
    capitals = {word for word in re.findall(r"\b[A-Z]{2,}\b", text) if word.lower() not in _OTHER_SIDE}
    return not text.isupper() and not capitals <= _UNPRINTED_CAPITALS


def _is_unmirrorable(text: str, words: set[str], has_hour: bool) -> bool:
    """Whether a sentence (in lower case, clock positions replaced by "~") cannot be mirrored, apart from its sides."""
    return bool(
        _UNMIRRORABLE.search(text)
        or words & (_TEXT_WORDS | _HANDED_WORDS)
        or (has_hour and words & _CLOCK_WORDS)
        or not (_READING_ORDER.search(text) or all(_COUNTED.match(text, o.end()) for o in _ORDINAL.finditer(text)))
        or any(word not in _OTHER_SIDE and _resembles_side(word) for word in words)
    )


@cache
def _resembles_side(word: str) -> bool:
    if word in _NOT_SIDES:
        return False
    return "left" in word or "right" in word or bool(difflib.get_close_matches(word, _SIDE_NAMES, 1, cutoff=0.75))


def _means_side(text: str, start: int, end: int) -> bool | None:
    """
    Whether the word `text[start:end]`, one of `_OTHER_SIDE`, means a side; `None` if it is ambiguous.

    Except for the adverb, the rules are the same for left and right, so that the mirrored sentence is as clear.
    """
    word, head, tail = text[start:end], text[:start], text[end:]
    if word not in ("left", "right", "lft", "rt"):
        return True
    before = re.search(r"([a-z']+)[\s-]+$", head)
    after = re.match(r"[\s-]+([a-z']+)", tail)
    if after and after[1] in _NEVER_A_SIDE_BEFORE:
        return None
    if _PLACE_BEFORE.search(head) and not (_ON_BEFORE.search(head) and _ADVERB_AFTER.match(tail)):
        return True
    if _COUNT_BEFORE.search(head):
        return True
    if word == "right" and _ADVERB_BEFORE.search(head) and _ADVERB_AFTER.match(tail):
        return False
    if re.match(r"[\s-]+to[\s-]+(?:left|right|lft|rt)\b", tail):  # "left to right"
        after = None
    is_unclear = (before and before[1] in _UNCLEAR_BEFORE) or (after and after[1] in _UNCLEAR_AFTER)
    return None if is_unclear else True


def _mirror_hour(hour: str) -> str:
    if hour.isdigit():
        return str(12 - int(hour) % 12)
    return _HOURS[10 - _HOURS.index(hour)]  # twelve gives [-1], which is twelve


def _swap(text: str, swaps: list[tuple[tuple[int, int], str]]) -> str | None:
    """Replace each old word by the new one in the same case; `None` for a case like "lEFt"."""
    pieces, done = [], 0
    for (start, end), new in swaps:
        old = text[start:end]
        in_case = next((case(new) for case in (str.lower, str.capitalize, str.upper) if case(old) == old), None)
        if in_case is None:
            return None
        pieces += [text[done:start], in_case]
        done = end
    return "".join([*pieces, text[done:]])
