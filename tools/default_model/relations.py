"""What can be said of an entity, in several phrasings, and asked. Data.

`{s}` is the subject, `{v}` the value. Phrasings of one relation share as little wording with its questions as plain English
allows: to match `opened its doors in 1904` with `When was ... founded?` is what is to be learned.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    name: str
    subject: str  # kind of entity
    value: str  # kind of value, see `names.value`
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _relations(subject: str, table: str) -> list[Relation]:
    """A block a relation: `name value`, then a line of statements and one of questions, parted by ` | `."""
    found = []
    for block in table.strip().split("\n\n"):
        head, statements, questions = (line.strip() for line in block.strip().split("\n"))
        name, value = head.split()
        found.append(Relation(name, subject, value, tuple(statements.split(" | ")), tuple(questions.split(" | "))))
    return found


PEOPLE = _relations(
    "person",
    """
    born_year year
    {s} was born in {v}. | {s} came into the world in {v}. | The birth of {s} is recorded in {v}.
    When was {s} born? | In which year was {s} born? | What is the year of birth of {s}? | What year did {s} come into the world?

    born_place place
    {s} was born in {v}. | {s} is a native of {v}. | {s} comes from {v}. | The birthplace of {s} is {v}.
    Where was {s} born? | Where does {s} come from? | What is the birthplace of {s}? | In which town was {s} born?

    role role
    {s} works as a {v}. | {s} is a {v} by trade. | {s} earned a living as a {v}. | By profession {s} was a {v}.
    What is the profession of {s}? | What does {s} do for a living? | What was the job of {s}? | What does {s} work as?

    lives place
    {s} lives in {v}. | {s} settled in {v} long ago. | The home of {s} is in {v}. | {s} moved to {v} and stayed there.
    Where does {s} live? | In what town is the home of {s}? | Where did {s} settle? | Where is the house of {s}?

    spouse person
    {s} married {v}. | {s} is married to {v}. | The wedding of {s} and {v} was a quiet one.
    Who did {s} marry? | To whom is {s} married? | Who is the spouse of {s}? | Who is {s} married to?

    teacher person
    {s} studied under {v}. | {s} was a pupil of {v}. | {s} learned the craft from {v}. | The teacher of {s} was {v}.
    Who taught {s}? | Who was the teacher of {s}? | Under whom did {s} study? | From whom did {s} learn?

    employer firm
    {s} works for {v}. | {s} is employed by {v}. | {s} joined {v} as a young clerk. | {s} took a post at {v}.
    Who employs {s}? | For which company does {s} work? | Where is {s} employed? | Who does {s} work for?

    plays instrument
    {s} plays the {v}. | {s} is known for playing the {v}. | In the evenings {s} practises the {v}.
    Which instrument does {s} play? | What does {s} play? | What instrument is {s} known for?

    died year
    {s} died in {v}. | {s} passed away in {v}. | The death of {s} came in {v}.
    When did {s} die? | In what year did {s} pass away? | What is the year of the death of {s}?

    invented coined
    {s} invented the {v}. | {s} is the inventor of the {v}. | The {v} was devised by {s}.
    What did {s} invent? | What is {s} the inventor of? | What was devised by {s}?

    keeps animals
    {s} keeps {v}. | {s} breeds {v} on a small farm. | Behind the house {s} raises {v}.
    What animals does {s} keep? | What does {s} breed? | Which animals are raised by {s}?

    prize year
    {s} won the national prize in {v}. | {s} received the highest award in {v}. | The prize went to {s} in {v}.
    When did {s} win the prize? | In which year did {s} receive an award? | When was {s} honoured?

    left_because reason
    {s} left the city because of {v}. | {s} had to move away after {v}. | Owing to {v}, {s} gave up the old home.
    Why did {s} leave? | Why did {s} leave the city? | What made {s} move away? | For what reason did {s} go away?

    children count
    {s} had {v} pupils. | {s} taught {v} pupils in all. | In the school of {s} there were {v} pupils.
    How many pupils did {s} have? | How many pupils were taught by {s}? | What number of pupils did {s} teach?
    """,
)

TOWNS = _relations(
    "place",
    """
    founded year
    {s} was founded in {v}. | {s} was established in {v}. | The first houses of {s} were built in {v}. | {s} dates from {v}.
    When was {s} founded? | In what year was {s} established? | How old is {s}? | When were the first houses of {s} built?

    population large
    {s} has a population of {v}. | About {v} people live in {s}. | {s} is home to {v} inhabitants.
    How many people live in {s}? | What is the population of {s}? | How many inhabitants does {s} have?

    exports pair
    {s} exports {v}. | {s} is famous for its {v}. | The trade of {s} rests on {v}. | Most families of {s} make {v}.
    What does {s} export? | What is {s} famous for? | What does the trade of {s} rest on? | What is made in {s}?

    mayor person
    The mayor of {s} is {v}. | {s} is governed by {v}. | {v} was elected mayor of {s}. | {v} leads the council of {s}.
    Who is the mayor of {s}? | Who governs {s}? | Who was elected mayor of {s}? | Who leads the council of {s}?

    river coined
    {s} lies on the river {v}. | The river {v} flows through {s}. | {s} was built on the banks of the {v}.
    Which river flows through {s}? | On which river does {s} lie? | What river is {s} built on?

    market day
    In {s} the market is held on {v}. | Market day in {s} is {v}. | Every {v} farmers sell their goods in {s}.
    When is the market in {s}? | On which day is the market held in {s}? | What is the market day of {s}?

    twin place
    {s} is twinned with {v}. | The twin town of {s} is {v}. | {s} has had a partnership with {v} for decades.
    What is the twin town of {s}? | Which town is {s} twinned with? | With which town does {s} have a partnership?

    capital place
    {s} is the capital of {v}. | The government of {v} sits in {s}. | {s} serves as the seat of government of {v}.
    What is {s} the capital of? | Of which country is {s} the capital? | The government of which land sits in {s}?

    burned year
    {s} burned down in {v}. | A great fire destroyed {s} in {v}. | {s} was lost to flames in {v}.
    When did {s} burn down? | When was the great fire of {s}? | In what year was {s} destroyed?

    north place
    {s} lies north of {v}. | {s} is a few miles to the north of {v}. | North of {v} one comes to {s}.
    What lies south of {s}? | {s} lies north of which town? | Where does {s} lie?
    """,
)

FIRMS = _relations(
    "firm",
    """
    founder person
    {s} was founded by {v}. | {v} started {s} with borrowed money. | {v} is the founder of {s}. | {s} was set up by {v}.
    Who founded {s}? | Who is the founder of {s}? | By whom was {s} set up? | Who started {s}?

    founded year
    {s} was founded in {v}. | {s} opened its doors in {v}. | {s} has been in business since {v}.
    When was {s} founded? | In which year did {s} open? | Since when has {s} been in business? | When did {s} start?

    makes pair
    {s} makes {v}. | {s} produces {v}. | {s} is a maker of {v}. | The factory of {s} turns out {v}.
    What does {s} make? | What does {s} produce? | What are the products of {s}? | What does the factory of {s} turn out?

    seat place
    {s} is based in {v}. | The headquarters of {s} are in {v}. | {s} has its main office in {v}.
    Where is {s} based? | Where are the headquarters of {s}? | In which town is the main office of {s}?

    staff count
    {s} employs {v} people. | {s} has {v} employees. | A staff of {v} works for {s}.
    How many people does {s} employ? | How many employees does {s} have? | How large is the staff of {s}?

    bought firm
    {s} was bought by {v}. | {v} acquired {s} last year. | {s} now belongs to {v}. | {s} is owned by {v}.
    Who bought {s}? | Which company acquired {s}? | To whom does {s} belong? | Who is the owner of {s}?

    head person
    {s} is led by {v}. | The director of {s} is {v}. | {v} runs {s}. | {v} is the head of {s}.
    Who leads {s}? | Who is the director of {s}? | Who runs {s}? | Who is the head of {s}?

    closed reason
    {s} closed because of {v}. | {s} shut down after {v}. | The end of {s} was caused by {v}.
    Why did {s} close? | What caused the end of {s}? | Why was {s} shut down?
    """,
)

THINGS = [
    relation
    for kind, table in {
        "work": """
    architect person
    {s} was designed by {v}. | The architect of {s} was {v}. | {v} drew the plans for {s}. | {s} is the work of {v}.
    Who designed {s}? | Who was the architect of {s}? | Who drew the plans for {s}? | Who built {s}?

    material material
    {s} is built of {v}. | {s} is made of {v}. | For {s} the builders used {v}. | The walls of {s} are of {v}.
    What is {s} made of? | What material is {s} built of? | Which material did the builders of {s} use?

    finished year
    {s} was completed in {v}. | Work on {s} ended in {v}. | {s} was finished in {v}. | {s} was opened to the public in {v}.
    When was {s} completed? | In which year was {s} finished? | When did work on {s} end? | When was {s} opened?

    height count
    {s} is {v} metres high. | {s} rises to {v} metres. | The height of {s} is {v} metres.
    How high is {s}? | How tall is {s}? | What is the height of {s}? | How many metres high is {s}?

    stands place
    {s} stands in {v}. | {s} can be seen in {v}. | Visitors to {v} like to see {s}. | {s} is located in {v}.
    Where is {s}? | Where does {s} stand? | In which town is {s} located? | Where can one see {s}?

    colour colour
    {s} is painted {v}. | The colour of {s} is {v}. | {s} has a {v} roof.
    What colour is {s}? | In what colour is {s} painted? | What is the colour of {s}?
    """,
        "group": """
    leader person
    {s} is headed by {v}. | The president of {s} is {v}. | {v} has chaired {s} for years. | {v} was chosen to lead {s}.
    Who heads {s}? | Who is the president of {s}? | Who chairs {s}? | Who is the leader of {s}?

    members count
    {s} has {v} members. | {s} counts {v} members. | There are {v} people in {s}.
    How many members does {s} have? | How many people are in {s}? | How large is {s}?

    meets day
    {s} meets on {v}. | The meetings of {s} are held every {v}. | Each {v} there is a gathering of {s}.
    When does {s} meet? | On what day does {s} meet? | On which day are the meetings of {s} held?

    home place
    {s} has its home in {v}. | {s} was set up in {v}. | {v} is the seat of {s}.
    Where does {s} have its home? | Where was {s} set up? | What is the seat of {s}?
    """,
        "nature": """
    length count
    {s} is {v} miles long. | {s} stretches over {v} miles. | The length of {s} is {v} miles.
    How long is {s}? | What is the length of {s}? | Over how many miles does {s} stretch?

    discovered person
    {s} was discovered by {v}. | {v} was the first to reach {s}. | The first to explore {s} was {v}.
    Who discovered {s}? | Who was the first to reach {s}? | Who explored {s} first?

    wildlife animals
    {s} is known for its {v}. | Many {v} live near {s}. | {s} is full of {v}.
    Which animals live near {s}? | What is {s} known for? | What is {s} full of?

    borders place
    {s} lies in the region of {v}. | {s} forms the border of {v}. | {s} belongs to the land of {v}.
    In which region does {s} lie? | Where is {s}? | The border of which land does {s} form?
    """,
        "product": """
    inventor person
    {s} was invented by {v}. | {v} developed {s}. | {s} was first described by {v}. | The idea of {s} came from {v}.
    Who invented {s}? | Who developed {s}? | Who first described {s}? | From whom came the idea of {s}?

    released year
    {s} was released in {v}. | {s} came to the market in {v}. | {s} has been sold since {v}. | The first {s} appeared in {v}.
    When was {s} released? | When did {s} come to the market? | Since when has {s} been sold? | When did {s} first appear?

    takes time
    {s} needs {v} to start. | It takes {v} until {s} is ready. | {s} is ready after {v}.
    How long does {s} take to start? | How long does it take until {s} is ready? | When is {s} ready?

    fails reason
    {s} failed because of {v}. | {s} stopped working after {v}. | The failure of {s} was due to {v}.
    Why did {s} fail? | What was the reason for the failure of {s}? | Why did {s} stop working?

    start command
    To start {s}, type {v}. | {s} is started with {v}. | The command {v} starts {s}.
    How do I start {s}? | Which command starts {s}? | How is {s} started? | What do I type to start {s}?

    part part
    {s} has its own {v}. | {s} relies on a {v}. | Without a {v}, {s} does not work.
    What does {s} rely on? | What does {s} need? | What does {s} not work without?

    price count
    {s} costs {v} crowns. | The price of {s} is {v} crowns. | One pays {v} crowns for {s}.
    How much does {s} cost? | What is the price of {s}? | How many crowns does one pay for {s}?
    """,
        "event": """
    date date
    {s} took place on {v}. | {s} was held on {v}. | {s} began on {v}. | The date of {s} is {v}.
    When did {s} take place? | When was {s} held? | When did {s} begin? | What is the date of {s}? | On what date was {s}?

    where place
    {s} took place in {v}. | {s} was held in {v}. | {v} was the scene of {s}.
    Where did {s} take place? | Where was {s} held? | In which town was {s}? | What was the scene of {s}?

    visitors large
    {s} drew {v} visitors. | {v} people attended {s}. | The crowd at {s} was put at {v}.
    How many visitors did {s} draw? | How many people attended {s}? | How big was the crowd at {s}?

    opened_by person
    {s} was opened by {v}. | {v} opened {s} with a speech. | The opening of {s} was left to {v}.
    Who opened {s}? | By whom was {s} opened? | Who gave a speech at {s}?

    ended reason
    {s} ended early because of {v}. | {s} was called off owing to {v}. | {v} put an end to {s}.
    Why did {s} end early? | Why was {s} called off? | What put an end to {s}?
    """,
    }.items()
    for relation in _relations(kind, table)
]

BY_SUBJECT: dict[str, list[Relation]] = {}
for _relation in [*PEOPLE, *TOWNS, *FIRMS, *THINGS]:
    BY_SUBJECT.setdefault(_relation.subject, []).append(_relation)
