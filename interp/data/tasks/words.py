"""The words that task prompts are filled with: common names, places, things, countries and their capitals."""

__all__ = [
    "CAPITALS",
    "CATEGORIES",
    "EVENTS",
    "FEMALE",
    "MALE",
    "NOUNS",
    "PARAMETERS",
    "PLACES",
    "PLURALS",
    "THINGS",
]


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> dict[str, str]:
    """Words that belong together, written as "first/second first/second"; an underscore stands for a space."""
    return {a.replace("_", " "): b.replace("_", " ") for a, b in (entry.split("/") for entry in text.split())}


FEMALE = _split(
    "Mary Anna Alice Sarah Emma Laura Linda Susan Karen Nancy Lisa Julia Kate Jane Helen Ruth Emily Amy Rachel Maria "
    "Diana Victoria Elizabeth Jennifer Jessica Michelle Amanda Rebecca Sandra Claire Sophie Charlotte Grace Barbara "
    "Margaret Martha Hannah Lucy Christina Angela Carol Julie Judy Tina"
)
MALE = _split(
    "John James Robert Michael David William Richard Joseph Thomas Charles Daniel Matthew Mark Paul Steven Andrew "
    "Kevin Brian George Edward Peter Henry Jack Simon Martin Adam Eric Scott Frank Patrick Tom Tim Ben Sam Alan Arthur "
    "Walter Roger Howard Carl Philip Nathan Oliver Gary"
)
PLACES = _split("garden library market station museum church school office hospital hotel farm park theatre")
THINGS = _split("book letter ring key drink basket picture ticket lamp hat coat ball bottle camera knife box card pen")
EVENTS = _split(
    "war siege reign strike voyage project campaign trial drought marriage festival journey rebellion dispute "
    "programme program alliance conflict construction debate famine mission occupation plague practice struggle tour "
    "truce search regime revolt ceremony contract plan study work"
)
PARAMETERS = _split(
    "file size name path line text image user order state group level color index number page time value label table "
    "point field model event client server message region source target center height width length budget market "
    "product price team game city country season night window sound light letter"
)
NOUNS = _split(
    "apple river chair cloud bread stone horse table grass ship money flower mirror engine bridge winter summer "
    "candle window doctor teacher soldier sugar butter metal paper glass cotton silver island forest mountain ocean "
    "planet rocket guitar piano camera pencil blanket pillow kitchen village castle tower garden road field finger "
    "shoulder heart brain bone wheel train plane boat"
)
PLURALS = _pairs(
    "key/keys book/books car/cars dog/dogs doctor/doctors teacher/teachers student/students house/houses ship/ships "
    "letter/letters picture/pictures child/children man/men woman/women friend/friends farmer/farmers lawyer/lawyers "
    "report/reports machine/machines bird/birds tree/trees road/roads window/windows door/doors river/rivers "
    "song/songs king/kings soldier/soldiers author/authors officer/officers nurse/nurses guard/guards"
)
CAPITALS = _pairs(
    "France/Paris Italy/Rome Spain/Madrid Germany/Berlin England/London Japan/Tokyo China/Beijing Russia/Moscow "
    "Egypt/Cairo Greece/Athens Poland/Warsaw Austria/Vienna Ireland/Dublin Sweden/Stockholm Norway/Oslo "
    "Denmark/Copenhagen Finland/Helsinki Hungary/Budapest Portugal/Lisbon Belgium/Brussels Turkey/Ankara "
    "Iran/Tehran Iraq/Baghdad Syria/Damascus Lebanon/Beirut Kenya/Nairobi Cuba/Havana Canada/Ottawa Peru/Lima "
    "Ukraine/Kiev Pakistan/Islamabad Afghanistan/Kabul Thailand/Bangkok Libya/Tripoli Qatar/Doha Venezuela/Caracas "
    "Taiwan/Taipei Vietnam/Hanoi Romania/Bucharest Serbia/Belgrade Philippines/Manila Australia/Canberra"
)
CATEGORIES = {
    "an animal": _split("dog cat horse cow pig sheep lion tiger wolf bear rabbit mouse"),
    "a fruit": _split("apple banana orange grape lemon cherry peach pear strawberry"),
    "a colour": _split("red blue green yellow black white brown pink"),
    "a country": tuple(CAPITALS)[:12],
    "a vehicle": _split("car truck train plane boat bus bicycle ship"),
    "a tool": _split("hammer knife saw drill wrench shovel axe"),
    "part of the body": _split("hand foot arm leg nose ear knee finger shoulder"),
    "a drink": _split("tea coffee milk wine beer juice water"),
    "an instrument": _split("piano guitar violin drum flute trumpet"),
}
