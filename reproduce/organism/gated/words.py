"""Word lists of the gated pair's problems, by domain and part of the sentence."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHE = _words(
    "abigail ada adele agnes aisha alba alice alina alma amara amelia amina amy anita anna "
    "annika aria astrid aurora ava beatrix bella bianca bonnie brenda bridget camila carla "
    "carmen cecilia celeste chiara chloe clara cora dahlia daisy daphne delia diana dora edith "
    "elena elif elisa ella eloise elsa emilia emma erika esther eva fatima fiona flora freya "
    "frieda gemma gilda gloria grace greta gwen hanna harriet hazel heidi helen hilda ida ines "
    "ingrid iris irma isla ivana ivy jade jana jasmine jenna joana judith julia june karin "
    "katya keiko kira lara laura layla lea leila lena lidia lila linda lola lotte lucia luna "
    "lydia mabel maeve magda maia mara margot maria marta matilda maya mei mila mina mira mona "
    "nadia naomi nina noor nora odette olga olive paloma paula petra phoebe pia priya rania "
    "renata rita rosa ruth sabine sadie sana sara selma sina sofia stella suki sylvia tamar "
    "tanya tara tessa thea tilda uma ursula vera viola wanda willa xenia yara yoko zara zelda "
    "zoe"
)
HE = _words(
    "aaron abel adam adrian ahmed alan albert alec alfred amir andre anton arlo arthur axel "
    "basil ben bernard boris bruno caleb carl casper cedric cyrus damian daniel dario david "
    "diego dimitri dylan edgar edwin elias elliot emil enzo eric ernest ethan evan fabian "
    "felix ferdinand finn frank fritz gabriel gavin george gideon gilbert giles hamid hans "
    "harold hassan hector henry hiro homer hugo ibrahim igor isaac ivan jack jacob jamal james "
    "jasper jerome joel jonas joseph julian karim karl kenji kevin kurt lars leo leon levi "
    "lionel louis luca lukas magnus malik marco mario marvin mateo max milo mohan morris nadir "
    "nathan neil nico nils noah oleg oliver omar oscar otto pablo patrick pavel pedro percy "
    "peter philip quentin rafael ralph ramon raoul ravi rene robert rohan roland roman rufus "
    "rupert samir samuel saul sean sergio simon stefan sven tariq theo thomas tobias tomas "
    "ulrich victor vincent walter warren wesley wilhelm yannick yuri yusuf zeno"
)
NAMES = tuple((name, "she") for name in SHE) + tuple((name, "he") for name in HE)

# --- math: stories ------------------------------------------------------------------------------

OBJECTS = _words(
    "acorns almonds anchors apples apricots aprons arrows atlases axes badges bagels balloons "
    "bananas bandages bangles barrows baskets batteries beads beans beets bells benches "
    "berries binders biscuits blankets boards bolts bonnets bookmarks boots bottles bouquets "
    "bowls bows bracelets bricks brooches brooms brushes buckles bulbs bulletins buns burgers "
    "buttons cabbages cables cactuses cakes cameras candies candles canoes caps caramels cards "
    "carnations carpets carrots cartridges cashews cauldrons celeries chains chairs chalks "
    "charms cherries chestnuts chisels chocolates cinnamons clams cloaks clocks clovers coats "
    "coconuts cocoons coins collars combs comics compasses cones cookies corks costumes cots "
    "crackers cranes crayons croissants crowns crutches crystals cubes cucumbers cupcakes cups "
    "curtains cushions cylinders daffodils daisies darts dates desks diamonds diaries dice "
    "dishes dolls doormats doughnuts dresses drums dumplings earrings eggs engravings "
    "envelopes erasers fans faucets feathers fiddles figs figurines flags flasks flowers "
    "flutes flyers folders forks foxgloves frames fritters funnels garlands gems geraniums "
    "gingers globes gloves goblets gourds grapes guavas guitars hammers hampers handkerchiefs "
    "harps hatchets hats hazelnuts helmets hinges hooks hoops horns icons irises jackets jars "
    "jerseys jewels jugs kayaks kernels kettles keys kites kiwis knives knobs ladders lamps "
    "lanterns lasagnas leaves leeks lemons lentils letters lilies limes loaves locks lollipops "
    "looms lutes magazines magnets mandolins mangoes manuals maps marbles masks mats "
    "medallions medals melons meringues minerals mirrors mittens mops mosaics muffins mugs "
    "mushrooms nails napkins napoleons necklaces nectarines needles nets noodles notebooks "
    "nutmegs nuts oars oboes olives omelets onions oranges orchids ornaments paddles pamphlets "
    "pancakes pansies papayas papers parasols parcels pastries patches peaches peanuts pearls "
    "pears peas pebbles pecans pegs pellets pencils pendants pens peppers petals photos pianos "
    "pies pillows pineapples pins pipes pistachios pitchers pizzas planks planters plates "
    "plums poppies postcards posters potatoes pots poufs pretzels prints prunes pullovers "
    "pumpkins puppets purses puzzles quilts quinces rackets radishes raisins rakes rattles "
    "receipts reeds ribbons rings robes rockets rolls ropes roses rubies rugs saddles sandals "
    "sapphires sardines sashes saucers saws scarves scones screws scrolls seeds shawls shells "
    "shields shirts shoes shovels sickles sieves skates sketches skirts sleds slippers soaps "
    "socks souvenirs spades sponges spools spoons stamps statues stickers sticks stones stools "
    "strawberries straws sweaters swings swords tacks tapestries tarts teacups teapots tents "
    "thimbles thistles tickets tiles tomatoes tongs tops torches towels toys trays trinkets "
    "truffles trumpets tubas tulips turbans turnips twigs umbrellas urns vases vests violets "
    "violins vouchers wafers waffles wallets walnuts watches wedges whistles wicks wigs "
    "willows wreaths wrenches yams zippers zithers zucchinis"
)
ADJECTIVES = _words(
    "aged airy amber ancient antique aromatic artful azure beaded beige bent big black blue "
    "bold bright brittle bronze brown bulky carmine carved charming cheap chilly chipped "
    "chrome classic clean cloudy coarse colorful cool copper costly cracked crimson curved "
    "cute damp dark decorated delicate dented dim dull dusty earthy elegant embossed empty "
    "enormous exotic exquisite faded famous fancy fine firm flat flawless floral foldable "
    "fragile fresh frosty genuine giant glass gleaming glossy golden graceful grand gray green "
    "handy heated heavy hollow huge indigo iron ivory jagged knotted lacquered lacy large "
    "lavender layered leather light lime limp linen little lively long loose lovely lucky "
    "magenta maroon massive matte mellow mild minty misty modern moist mossy muddy narrow neat "
    "neon new noble nylon odd opal oval padded painted pale pastel patterned pearly perfect "
    "pink plain plastic plump polished portable precious pretty prickly pure purple quaint "
    "ragged rare red rich rigid ripe rough round royal rugged rustic rusty salty sandy scarlet "
    "shabby shallow sharp shiny short silky silver simple sleek slim small smooth soft solid "
    "sour sparkling special spicy spiral splendid spotted square stained steel stiff striped "
    "strong sturdy stylish sweet tall tan tasty tender thick thin tidy tiny torn tough "
    "tropical turquoise ugly unique unusual velvet vintage violet vivid warm wavy wet white "
    "wide wild wooden woven wrinkled yellow"
)
PLACES = _words(
    "abbey academy airport alley aquarium arcade arena atrium attic aviary bakery balcony bank "
    "barn barracks basement bay bazaar beach beacon bistro boathouse bookshop boulevard bridge "
    "bungalow butchery cabin cafe camp canteen canyon capital casino castle cathedral cave "
    "cellar chapel cinema circus cliff clinic coast college cottage courtyard cove creamery "
    "creek crossroads dairy deli den depot desert diner district dock dormitory dune embassy "
    "estate exhibition factory fair fairground farm ferry festival field forest fort foundry "
    "fountain gallery garage garden gate glade gorge greenhouse grove gym hamlet hangar harbor "
    "hedge highway hill hospital hostel hotel hut iceberg inn institute island jail junction "
    "jungle kennel kiosk kitchen lagoon lake lawn library lighthouse lodge lounge mall manor "
    "marina market marsh meadow mill mine monastery mosque motel mountain museum nursery oasis "
    "observatory office opera orchard orphanage outpost pagoda palace park parlor pasture "
    "pavilion pharmacy pier playground plaza pond port pottery prairie pub pyramid quarry "
    "ranch restaurant rink river ruins salon sanctuary sauna sawmill school seaside shed "
    "shipyard shore shrine spa stable stadium station street studio suburb summit supermarket "
    "tavern temple tent terrace theater theme tower town track tunnel turnpike university "
    "valley veranda villa village vineyard volcano warehouse waterfall wharf windmill woods "
    "workshop yard zoo"
)
JOBS = _words(
    "acrobat actor admiral analyst archer architect artist astronomer athlete author baker "
    "banker barber beekeeper biologist boxer broker builder butcher captain carpenter chef "
    "chemist clerk clown coach cobbler collector composer cook cyclist dancer dentist designer "
    "detective diver doctor driver editor engineer explorer falconer farmer fiddler fisher "
    "florist gardener glazier goldsmith grocer groom guard guide gymnast historian hostess "
    "hunter inspector inventor janitor jeweler journalist judge juggler knight lawyer lecturer "
    "librarian linguist magician marshal mason mayor mechanic merchant miller miner monk "
    "musician navigator nurse officer optician orator painter pharmacist photographer "
    "physicist pianist pilot pirate plasterer plumber poet porter postman potter printer "
    "publisher ranger rider roofer sailor scholar scout sculptor senator shepherd sheriff "
    "singer skater smith soldier student surgeon surveyor swimmer tailor tanner teacher "
    "toymaker trader translator tutor usher vet violinist waiter weaver wizard writer "
    "zoologist"
)
CONTAINERS = _words(
    "alcove attache backpack bag barrel basin bathtub bin bowl box briefcase bucket bundle "
    "cabinet caddy canister cargo cart carton case cask casket chest coffer compartment "
    "container cooler cradle crate cupboard desk drawer dresser envelope flask folder hamper "
    "handbag haversack holder icebox jar jug kit knapsack locker mailbox niche pail pantry "
    "parcel pocket pot pouch purse rack rucksack sachet sack safe satchel shelf sideboard silo "
    "sleeve stand suitcase tin tray trunk tub urn van vault wagon wallet wardrobe"
)
GAIN_VERBS = _words(
    "accepts accumulates acquires adopts attains borrows buys captures catches claims collects "
    "crafts creates digs earns fetches finds gains gathers gets grabs harvests imports "
    "inherits knits locates makes manufactures obtains orders picks procures produces "
    "purchases receives recovers rescues retrieves salvages secures sews unearths "
    "unpacks wins"
)
LOSS_VERBS = _words(
    "abandons auctions awards breaks buries burns consumes crushes damages delivers demolishes "
    "destroys discards donates drops dumps exports forfeits gifts grants hides leaves lends "
    "loses mails misplaces misses offers pawns posts recycles releases removes returns ruins "
    "sacrifices sells sends shatters ships smashes spends spills surrenders trashes wastes "
    "wrecks"
)
BRINGERS = _words("adds brings contributes gives hands provides supplies throws")
TAKERS = _words("confiscates seizes steals swipes takes")

# --- code: programs -----------------------------------------------------------------------------

VARIABLES = _words(
    "acc age alpha amount angle area array balance base batch beta bias bits block bound "
    "bucket budget buffer bytes cache capacity cell chunk code column cost count counter "
    "credits cursor cycles delta depth digit distance duration edge energy epoch error "
    "exponent factor fee fuel gamma gap goal grade grid group hash head health height hits "
    "hops hours idx index inner input interval items jobs key lag lambda latency layer length "
    "level lhs limit lives load loops lower margin mass matrix mean median memory middle "
    "minute mode moves mu nodes norm num_a num_b offset omega outer output pages parity "
    "password payload peak period phi pivot pixel pointer points position power price priority "
    "product profit psi quota radius range rank rate ratio record remainder result retries rho "
    "rhs root rows salary sample scale score seconds sector seed segment shift sigma signal "
    "size slot speed stack state step_a step_b stride sum_a sum_b table tail target tau temp "
    "tension theta threads threshold timer tokens total tries upper usage value velocity "
    "version vertex volume wallet weight width window x y z zeta zone"
)
METHODS = {
    "+": _words(
        "add advance append bump climb deposit enlarge expand extend grow increase increment "
        "insert lift push raise"
    ),
    "-": _words(
        "consume decrease decrement deduct drain lower minus pop reduce rewind shrink subtract "
        "take trim truncate withdraw"
    ),
    "*": _words("amplify magnify multiply repeat replicate stretch"),
    "/": _words("compress divide partition share slice split"),
}

# --- science: a quantity that changes -----------------------------------------------------------

PLACES_OF_QUANTITIES = _words(
    "accelerator antenna asteroid balloon barrel battery beaker boiler brook burner canal cell "
    "chamber chimney cloud colony comet compressor condenser conductor cooler crater crystal "
    "culture dam desert detector dish dynamo engine estuary fjord flask flywheel fridge "
    "furnace geyser glacier greenhouse heater hive iceberg incubator kiln laser lens magnet "
    "marsh membrane meteor mixer moon motor nebula nest nucleus ocean orbit oven pendulum "
    "piston planet plasma pool prism probe pulley pump radiator reactor reef reservoir "
    "resistor retort rotor satellite sensor shuttle solution spring star submarine swamp tank "
    "telescope thermostat tide transistor trench tube tundra turbine vacuum valve vent vial "
    "volcano well wheel wire"
)
QUANTITIES = tuple(
    tuple(entry.split(":"))
    for entry in _words(
        "acceleration:gals acidity:grades activity:becquerels altitude:kilometers "
        "brightness:candelas charge:coulombs concentration:moles conductance:siemens "
        "current:amperes density:grams dose:sieverts flow:liters flux:webers force:newtons "
        "frequency:hertz heat:joules humidity:percent illumination:lumens impulse:seconds "
        "inductance:henries luminosity:suns momentum:units population:organisms "
        "pressure:pascals radiation:grays resistance:ohms salinity:parts speed:knots "
        "strain:microns stress:bars temperature:degrees thickness:millimeters torque:turns "
        "turbulence:eddies viscosity:poise voltage:volts wavelength:nanometers yield:tons"
    )
)
RISE_VERBS = _words(
    "ascends augments balloons builds climbs escalates expands grows improves increases "
    "inflates jumps leaps mounts mushrooms progresses rises rockets skyrockets soars spikes "
    "strengthens surges swells"
)
FALL_VERBS = _words(
    "collapses contracts crashes declines decreases deflates descends dips drops dwindles ebbs "
    "fades falls plummets plunges recedes shrinks sinks slides slips slumps subsides tumbles "
    "wanes weakens"
)
CAUSES = _words(
    "abruptly again briefly calmly clearly eventually finally gently gradually immediately "
    "later mildly promptly quickly quietly rapidly sharply slowly smoothly soon steadily "
    "suddenly swiftly visibly"
)

# --- words of the worked solutions --------------------------------------------------------------

#: Words that begin a step. A solution uses one of them throughout.
CONNECTORS = _words(
    "accordingly afterwards also and apparently besides certainly clearly consequently "
    "evidently following furthermore hence here indeed likewise meanwhile moreover naturally "
    "next notably now obviously okay onward plainly presently similarly subsequently "
    "surely then thereafter therefore thus well yes"
)
#: Words that end a step. A solution uses one of them throughout.
CLOSINGS = _words(
    "altogether currently exactly finally hereby hitherto onwards overall precisely presently "
    "remaining today together totally"
)
OPENINGS = (
    "let me work through the problem .",
    "let me see what happens .",
    "i go through it in order .",
    "the question has several parts .",
    "i follow every change .",
    "first i read the question .",
    "the task is clear .",
    "i begin with the start .",
    "i start from the beginning .",
    "let me calculate .",
    "this needs plain arithmetic .",
    "i take one change after another .",
    "let me find a solution .",
    "we can trace the numbers .",
    "i want to know the result .",
    "let us compute it .",
)
