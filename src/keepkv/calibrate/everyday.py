"""Facts that a calibration hides in texts and asks for. None is of a kind that a task asks for: those judge."""

PEOPLE = (
    "Alice", "Bernard", "Cecilia", "Dmitri", "Esther", "Felix", "Gloria", "Hugo", "Ingrid", "Julian", "Kerstin", "Leon",
    "Miriam", "Norbert", "Ottilie", "Paul", "Quentin", "Rosa", "Stefan", "Ursula",
)  # fmt: skip
TOWNS = (
    "Geneva", "Porto", "Krakow", "Bergen", "Seville", "Denver", "Kyoto", "Bristol", "Naples", "Riga", "Hamburg", "Lyon",
)  # fmt: skip
YEARS = tuple(str(year) for year in range(1931, 1999, 5))
SPORTS = ("tennis", "rowing", "chess", "hockey", "fencing", "judo", "golf", "rugby", "archery", "surfing")
TONGUES = ("Finnish", "Hindi", "Arabic", "Turkish", "Korean", "Polish", "Greek", "Swahili", "Danish", "Czech")
ANIMALS = ("a goat", "a parrot", "two rabbits", "a tortoise", "a pony", "three hens", "a snake", "a ferret")
INSTRUMENTS = ("the cello", "the flute", "the trumpet", "the organ", "the harp", "the drums", "the oboe")
NUMBERS = tuple(f"{17 * n % 900 + 100}" for n in range(3, 40))
HOURS = ("six o'clock", "noon", "half past nine", "a quarter to eight", "eleven o'clock", "midnight", "twenty past two")
SHOPS = ("bakery", "pharmacy", "bookshop", "florist", "butcher", "optician", "hardware store", "tea house")
STREETS = ("Mill Lane", "Station Road", "Harbour Street", "Church Square", "Castle Hill", "Elm Avenue", "Dock Row")
STONES = ("marble", "granite", "brick", "oak", "copper", "slate", "glass", "iron")
BUILDINGS = ("library", "theatre", "town hall", "museum", "chapel", "market hall", "school", "prison")
SIZES = ("small", "medium", "large", "38", "40", "42", "44", "46")

# What is noted, what is asked, whom it is about, and what the answer may be.
KINDS = (
    (" {} was born in {}.", "In which year was {} born?", PEOPLE, YEARS),
    (" On weekends {} plays {}.", "Which sport does {} play?", PEOPLE, SPORTS),
    (" As a child {} learned {}.", "Which language did {} learn as a child?", PEOPLE, TONGUES),
    (" Behind the house {} keeps {}.", "What does {} keep behind the house?", PEOPLE, ANIMALS),
    (" In the orchestra {} plays {}.", "Which instrument does {} play?", PEOPLE, INSTRUMENTS),
    (" The room of {} has the number {}.", "Which number has the room of {}?", PEOPLE, NUMBERS),
    (" The ferry to {} arrives at {}.", "When does the ferry to {} arrive?", TOWNS, HOURS),
    (" The {} has moved to {}.", "Where is the {} now?", SHOPS, STREETS),
    (" The roof of the {} is made of {}.", "What is the roof of the {} made of?", BUILDINGS, STONES),
    (" The coat for {} must be of size {}.", "Which size must the coat for {} be?", PEOPLE, SIZES),
    (" The twin town of {} is {}.", "What is the twin town of {}?", TOWNS[:6], TOWNS[6:]),
    (" The locker with the number {} belongs to {}.", "Who owns the locker with the number {}?", NUMBERS, PEOPLE),
)
