"""The closed lists behind the questions: countries and capitals, days, months, first names and common words."""

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

CAPITALS = {
    "Afghanistan": "Kabul", "Albania": "Tirana", "Algeria": "Algiers", "Angola": "Luanda", "Argentina": "Buenos Aires",
    "Armenia": "Yerevan", "Australia": "Canberra", "Austria": "Vienna", "Azerbaijan": "Baku", "Bahrain": "Manama",
    "Bangladesh": "Dhaka", "Belarus": "Minsk", "Belgium": "Brussels", "Bhutan": "Thimphu", "Botswana": "Gaborone",
    "Brazil": "Brasilia", "Bulgaria": "Sofia", "Cambodia": "Phnom Penh", "Cameroon": "Yaounde", "Canada": "Ottawa",
    "Chad": "N'Djamena", "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Costa Rica": "San Jose",
    "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia", "Denmark": "Copenhagen", "Ecuador": "Quito",
    "Egypt": "Cairo", "Eritrea": "Asmara", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Fiji": "Suva",
    "Finland": "Helsinki", "France": "Paris", "Georgia": "Tbilisi", "Germany": "Berlin", "Ghana": "Accra",
    "Greece": "Athens", "Guatemala": "Guatemala City", "Guinea": "Conakry", "Haiti": "Port-au-Prince",
    "Honduras": "Tegucigalpa", "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi",
    "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome",
    "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi", "Kuwait": "Kuwait City",
    "Laos": "Vientiane", "Latvia": "Riga", "Lebanon": "Beirut", "Liberia": "Monrovia", "Libya": "Tripoli",
    "Lithuania": "Vilnius", "Luxembourg": "Luxembourg", "Madagascar": "Antananarivo", "Mali": "Bamako",
    "Malta": "Valletta", "Mexico": "Mexico City", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat",
    "Mozambique": "Maputo", "Namibia": "Windhoek", "Nepal": "Kathmandu", "New Zealand": "Wellington",
    "Nicaragua": "Managua", "Niger": "Niamey", "Nigeria": "Abuja", "Norway": "Oslo", "Oman": "Muscat",
    "Pakistan": "Islamabad", "Panama": "Panama City", "Paraguay": "Asuncion", "Peru": "Lima",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow",
    "Rwanda": "Kigali", "Senegal": "Dakar", "Serbia": "Belgrade", "Singapore": "Singapore", "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana", "Somalia": "Mogadishu", "South Korea": "Seoul", "Spain": "Madrid", "Sudan": "Khartoum",
    "Sweden": "Stockholm", "Syria": "Damascus", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Uganda": "Kampala", "Ukraine": "Kyiv", "Uruguay": "Montevideo", "Venezuela": "Caracas", "Vietnam": "Hanoi",
    "Yemen": "Sanaa", "Zambia": "Lusaka", "Zimbabwe": "Harare",
}  # fmt: skip

NAMES_TEXT = """
Adam Aisha Alan Alice Amir Amy Ana Andrea Anna Anton Arthur Beatrice Ben Bianca Bob Boris Brian Carla Carlos Carmen
Cecilia Chen Clara Claire Daniel Daria David Diana Diego Dora Edgar Elena Elias Elif Eliza Ella Emil Emma Eric Erika
Esther Eva Fatima Felix Fiona Frank Frida George Grace Greta Hana Hannah Harry Hassan Helen Henry Hugo Ian Ibrahim Ines
Ingrid Irene Isabel Ivan Jack Jakob James Jana Jane Jasmin Joan John Jonas Jose Joseph Julia Julian Karen Karl Kate
Kenji Kim Lars Laura Lena Leo Leila Liam Lily Linda Lisa Louis Lucas Lucia Luis Luke Maja Marco Maria Marie Mark Marta
Martin Mary Matteo Max Maya Mei Mia Michael Miguel Mila Mohamed Mona Nadia Nadine Natalie Nick Nina Noah Nora Olga
Oliver Olivia Omar Oscar Otto Pablo Paul Paula Pedro Peter Petra Philip Priya Rachel Rahul Raj Rita Robert Rosa Ruth
Ryan Sam Samuel Sara Sarah Sergei Simon Sofia Sophie Stefan Stella Susan Tanja Tara Theo Thomas Tim Tina Tobias Tom
Vera Victor Viktoria Vincent Walter Wei William Yan Yuki Yusuf Zara Zoe
"""
NAMES = tuple(NAMES_TEXT.split())

WORDS_TEXT = """
able about above across act active actor add after again age agree air all alone along also always among anchor angel
anger angle animal ankle answer ant anyone apple april apron arch area arm army around arrow art artist aside ask atom
aunt autumn away axe baby back bacon badge bag bake ball bamboo banana band bank bar bark barn base basin basket bath
beach bean bear beard beast beauty bed bee before begin bell below belt bench berry best better big bike bird birth
bitter black blade blanket blood blue board boat body bone book boot border bottle bottom bowl box boy brain branch
brave bread breath brick bridge bright bring broken broom brother brown brush bubble bucket build bull burn bus bush
busy butter button cabin cable cactus cage cake calm camel camera camp candle candy canoe capital car card care carpet
carrot carry castle cat catch cave ceiling center chain chair chalk change cheese cherry chess chest chicken child
choice circle circus city class clay clean clear clever climb clock close cloth cloud clover clown coach coal coast
coat coconut coffee coin cold color comb comet common compass cook cookie cool copper copy coral corn corner cotton
couch country cousin cover cow crab crane cream cricket crop cross crowd crown cry cup curtain curve cushion cycle
daily damp dance danger dark date dawn day deal dear deep deer delta dentist desert desk detail dinner dirt dish doctor
dog dolphin donkey door double dove down dragon draw dream dress drink drive drop drum dry duck dust duty eagle ear
early earth east easy eat echo edge effort egg eight elbow elder elephant empty end engine enjoy enough equal evening
every exact eye face fact fair fairy fall family famous far farm farmer fast father favor feather fence fern festival
few field fig fight final find finger finish fire first fish five flag flame flat flight float floor flour flower flute
fly fog fold follow food foot forest forget fork four fox frame free fresh friend frog front frost fruit full funny
future galaxy game garage garden garlic gate gentle ghost giant gift ginger giraffe girl give glad glass globe glove
glue goat gold good goose grain grape grass gravity gray great green ground group grow guess guest guitar habit hair
half hall hammer hand happy harbor hard harvest hat hawk health heart heat heavy helmet help hen hero hidden high hill
history hobby holiday hollow home honest honey hope horn horse hospital hotel hour house human hungry hunt ice idea
image inch ink insect inside iron island ivory jacket jaguar jam jar jelly jewel job join joke journey joy judge juice
july jump june jungle keep kettle key kid kind king kiss kitchen kite kitten knee knife knot know ladder lady lake lamp
land language large last late laugh law layer lazy leader leaf learn leather left leg lemon lesson letter level library
life lift light like lime line lion lip list listen little lizard local lock log long loud love lucky lunch machine
magic magnet mango map maple march marble market mask match meadow meal medal melon memory metal middle milk mill mind
minute mirror mist model modern moment money monkey month moon morning mother motor mountain mouse mouth move mud
muffin museum music nail name narrow nation nature near neck needle nest never new next night nine noise noon north
nose note nothing novel now number nurse nut oak oasis ocean octopus office often oil old olive onion only open orange
orbit orchard order other otter outside oven over owl oyster paint palace palm panda paper parade parent park parrot
party past path peace peach peacock peanut pear pearl pebble pen pencil penguin pepper perfect person phone photo piano
picture pie pig pigeon pilot pillow pine pink pirate place plan plane planet plant plate play please plum pocket poem
poet point polar police pond pony pool popcorn poppy potato powder power present pretty price prince print prize
problem proud public pull pumpkin puppet puppy purple puzzle python quality quarter queen question quick quiet quilt
rabbit race radio rain rainbow ranch raven reach read ready real reason red reef repair reply rest rice rich ride right
ring ripe river road robin robot rock rocket roof room root rope rose rough round route royal ruby rule run sad saddle
safe sail salad salt same sand sauce school science scissors scout screen sea seal season second secret seed seven
shade shadow shark sharp sheep shelf shell ship shirt shoe shop short shoulder shovel shower sign silence silk silver
simple singer sister six sky sleep slow small smart smile smoke smooth snail snake snow soap soccer soft soil song
sound soup south space spark speak spice spider spinach spirit spoon sport spring square squirrel stable stage stair
star start station statue steam steel stone stop store storm story stove straw stream street strong student sugar
summer sun sunset supper surf swan sweet swim sword system table tail talk tall tea teacher team teeth temple ten
tennis tent theater thick thin thing think thirsty thread three throat thumb thunder ticket tiger tile time tiny title
toast today toe together tomato tool tooth top torch tower town toy track trade trail train travel tree triangle trip
truck true trumpet trust truth tulip tunnel turkey turtle twelve twenty twin two uncle under uniform up useful valley
value van vase velvet video view village violet violin visit voice volcano wagon wait walk wall walnut warm wash watch
water wave way weather week west whale wheat wheel whisper whistle white wide wild wind window winter wise wish wolf
wonder wood wool word work world worm wrist write yard year yellow yes young zebra zero adventure blueberry breakfast
butterfly carpenter champion chocolate crocodile dandelion dragonfly hurricane jellyfish keyboard lighthouse microscope
mushroom parachute pineapple porcupine raspberry sandwich saxophone snowflake spaceship starfish strawberry sunflower
telescope tomorrow vegetable waterfall wonderful xylophone yesterday
"""
WORDS = tuple(WORDS_TEXT.split())
