"""PASCAL-Context as released: LabelMap in .mat files, and the VOC 2010 devkit."""

import pathlib
import shutil

import numpy as np
import scipy.io
from layouts.voc import jpeg, name_list, pack

LABELS = """
accordion; aeroplane; air conditioner; antenna; artillery; ashtray; atrium; baby carriage; bag; ball; balloon; bamboo
weaving; barrel; baseball bat; basket; basketball backboard; bathtub; bed; bedclothes; beer; bell; bench; bicycle;
binoculars; bird; bird cage; bird feeder; bird nest; blackboard; board; boat; bone; book; bottle; bottle opener; bowl;
box; bracelet; brick; bridge; broom; brush; bucket; building; bus; cabinet; cabinet door; cage; cake; calculator;
calendar; camel; camera; camera lens; can; candle; candle holder; cap; car; card; cart; case; casette recorder; cash
register; cat; cd; cd player; ceiling; cell phone; cello; chain; chair; chessboard; chicken; chopstick; clip;
clippers; clock; closet; cloth; clothes tree; coffee; coffee machine; comb; computer; concrete; cone; container;
control booth; controller; cooker; copying machine; coral; cork; corkscrew; counter; court; cow; crabstick; crane;
crate; cross; crutch; cup; curtain; cushion; cutting board; dais; disc; disc case; dishwasher; dock; dog; dolphin;
door; drainer; dray; drink dispenser; drinking machine; drop; drug; drum; drum kit; duck; dumbbell; earphone;
earrings; egg; electric fan; electric iron; electric pot; electric saw; electronic keyboard; engine; envelope;
equipment; escalator; exhibition booth; extinguisher; eyeglass; fan; faucet; fax machine; fence; ferris wheel; fire
extinguisher; fire hydrant; fire place; fish; fish tank; fishbowl; fishing net; fishing pole; flag; flagstaff; flame;
flashlight; floor; flower; fly; foam; food; footbridge; forceps; fork; forklift; fountain; fox; frame; fridge; frog;
fruit; funnel; furnace; game controller; game machine; gas cylinder; gas hood; gas stove; gift box; glass; glass
marble; globe; glove; goal; grandstand; grass; gravestone; ground; guardrail; guitar; gun; hammer; hand cart; handle;
handrail; hanger; hard disk drive; hat; hay; headphone; heater; helicopter; helmet; holder; hook; horse; horse-drawn
carriage; hot-air balloon; hydrovalve; ice; inflator pump; ipod; iron; ironing board; jar; kart; kettle; key;
keyboard; kitchen range; kite; knife; knife block; ladder; ladder truck; ladle; laptop; leaves; lid; life buoy; light;
light bulb; lighter; line; lion; lobster; lock; machine; mailbox; mannequin; map; mask; mat; match book; mattress;
menu; metal; meter box; microphone; microwave; mirror; missile; model; money; monkey; mop; motorbike; mountain; mouse;
mouse pad; musical instrument; napkin; net; newspaper; oar; ornament; outlet; oven; oxygen bottle; pack; pan; paper;
paper box; paper cutter; parachute; parasol; parterre; patio; pelage; pen; pen container; pencil; person; photo;
piano; picture; pig; pillar; pillow; pipe; pitcher; plant; plastic; plate; platform; player; playground; pliers;
plume; poker; poker chip; pole; pool table; postcard; poster; pot; pottedplant; printer; projector; pumpkin; rabbit;
racket; radiator; radio; rail; rake; ramp; range hood; receiver; recorder; recreational machines; remote control;
road; robot; rock; rocket; rocking horse; rope; rug; ruler; runway; saddle; sand; saw; scale; scanner; scissors;
scoop; screen; screwdriver; sculpture; scythe; sewer; sewing machine; shed; sheep; shell; shelves; shoe; shopping
cart; shovel; sidecar; sidewalk; sign; signal light; sink; skateboard; ski; sky; sled; slippers; smoke; snail; snake;
snow; snowmobiles; sofa; spanner; spatula; speaker; speed bump; spice container; spoon; sprayer; squirrel; stage;
stair; stapler; stick; sticky note; stone; stool; stove; straw; stretcher; sun; sunglass; sunshade; surveillance
camera; swan; sweeper; swim ring; swimming pool; swing; switch; table; tableware; tank; tap; tape; tarp; telephone;
telephone booth; tent; tire; toaster; toilet; tong; tool; toothbrush; towel; toy; toy car; track; train; trampoline;
trash bin; tray; tree; tricycle; tripod; trophy; truck; tube; turtle; tvmonitor; tweezers; typewriter; umbrella;
unknown; vacuum cleaner; vending machine; video camera; video game console; video player; video tape; violin;
wakeboard; wall; wallet; wardrobe; washing machine; watch; water; water dispenser; water pipe; water skate board;
watermelon; whale; wharf; wheel; wheelchair; window; window blinds; wineglass; wire; wood; wool
"""  # of labels.txt, numbered from 1

LABELS_59 = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa
train tvmonitor bag bed bench book building cabinet ceiling clothes computer cup door fence floor flower food grass
ground keyboard light mountain mouse curtain platform sign plate road rock shelves sidewalk sky snow bedcloth track
tree truck wall water window wood
"""  # of 59_labels.txt

TRAIN, VAL = ("2008_000002", "2008_000008", "2010_002193"), ("2008_000003", "2009_000015")


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    root.mkdir(parents=True, exist_ok=True)
    labels = [" ".join(name.split()) for name in LABELS.split(";")]
    lines = [f"{number}: {name}\n" for number, name in enumerate(labels, 1)]
    (root / "labels.txt").write_text("".join(lines))
    (root / "59_labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(LABELS_59.split(), 1)))
    (root / "trainval").mkdir()
    for name in (*TRAIN, *VAL):
        jpeg(root / f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg", rng)
        numbers = rng.integers(0, len(labels) + 1, (16, 24), dtype=np.uint16).repeat(4, 0).repeat(4, 1)
        write_mask(root / f"trainval/{name}.mat", numbers)
    for split, names in (("train", TRAIN), ("val", VAL), ("trainval", (*TRAIN, *VAL))):
        name_list(root / f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt", names)
    if archives:
        pack(root / "VOCtrainval_03-May-2010.tar", root, ["VOCdevkit"])
        pack(root / "trainval.tar.gz", root, ["labels.txt", "trainval"])
        shutil.rmtree(root / "VOCdevkit")
        shutil.rmtree(root / "trainval")
        (root / "labels.txt").unlink()
    return {"train": 3, "val": 2}


def write_mask(path: pathlib.Path, numbers: np.ndarray) -> None:
    scipy.io.savemat(path, {"LabelMap": numbers}, do_compression=True)
