//! What devices there are: those that have a disk, those that disks are plugged into, and the rest of a machine, which
//! is taken and has no effect.

/// A kind of bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// PCI
    Pci,
    /// SCSI
    Scsi,
    /// IDE
    Ide,
    /// Any other.
    Other,
}

impl Bus {
    /// As messages call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pci => "PCI",
            Self::Scsi => "SCSI",
            Self::Ide => "IDE",
            Self::Other => "System",
        }
    }
}

/// What a device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk that is there as long as the device is.
    Disk,
    /// A drive with a tray, for media that are only read.
    Cd,
    /// Something with buses of its own: their kind, and how many.
    Controller(Bus, u32),
    /// Something of which a guest without a CPU knows nothing.
    Other,
}

/// A model of devices.
#[derive(Debug, PartialEq, Eq)]
pub struct Model {
    /// Its name.
    pub name: &'static str,
    /// Another name for it.
    pub alias: Option<&'static str>,
    /// Where it is plugged in.
    pub bus: Bus,
    /// What it is for.
    pub kind: Kind,
    /// Whose properties it has; nothing: they are not looked at.
    properties: Option<&'static str>,
    /// As the list of models describes it.
    text: Option<&'static str>,
}

const fn model(name: &'static str, alias: Option<&'static str>, bus: Bus, kind: Kind) -> Model {
    Model { name, alias, bus, kind, properties: None, text: None }
}

const fn drive(name: &'static str, bus: Bus, kind: Kind, text: &'static str) -> Model {
    Model { name, alias: None, bus, kind, properties: Some(name), text: Some(text) }
}

const fn virtio(name: &'static str, alias: Option<&'static str>, kind: Kind, like: &'static str) -> Model {
    Model { name, alias, bus: Bus::Pci, kind, properties: Some(like), text: None }
}

const BLK: &str = "virtio-blk-pci";
const SCSI: &str = "virtio-scsi-pci";
const SCSI_BUS: Kind = Kind::Controller(Bus::Scsi, 1);

static MODELS: [Model; 38] = [
    model("pci-bridge", None, Bus::Pci, Kind::Controller(Bus::Pci, 1)),
    model("pcie-root-port", None, Bus::Pci, Kind::Controller(Bus::Pci, 1)),
    model("pcie-pci-bridge", None, Bus::Pci, Kind::Controller(Bus::Pci, 1)),
    model("ioh3420", None, Bus::Pci, Kind::Controller(Bus::Pci, 1)),
    model("qemu-xhci", None, Bus::Pci, Kind::Other),
    model("usb-ehci", None, Bus::Pci, Kind::Other),
    model("piix3-usb-uhci", None, Bus::Pci, Kind::Other),
    model("ich9-ahci", Some("ahci"), Bus::Pci, Kind::Controller(Bus::Ide, 6)),
    drive("ide-cd", Bus::Ide, Kind::Cd, "virtual IDE CD-ROM"),
    drive("ide-hd", Bus::Ide, Kind::Disk, "virtual IDE disk"),
    drive("scsi-cd", Bus::Scsi, Kind::Cd, "virtual SCSI CD-ROM"),
    drive("scsi-hd", Bus::Scsi, Kind::Disk, "virtual SCSI disk"),
    virtio(BLK, Some("virtio-blk"), Kind::Disk, BLK),
    virtio("virtio-blk-pci-non-transitional", None, Kind::Disk, BLK),
    virtio("virtio-blk-pci-transitional", None, Kind::Disk, BLK),
    virtio(SCSI, Some("virtio-scsi"), SCSI_BUS, SCSI),
    virtio("virtio-scsi-pci-non-transitional", None, SCSI_BUS, SCSI),
    virtio("virtio-scsi-pci-transitional", None, SCSI_BUS, SCSI),
    model("e1000", None, Bus::Pci, Kind::Other),
    model("e1000e", None, Bus::Pci, Kind::Other),
    model("rtl8139", None, Bus::Pci, Kind::Other),
    model("virtio-net-pci", Some("virtio-net"), Bus::Pci, Kind::Other),
    model("usb-kbd", None, Bus::Other, Kind::Other),
    model("usb-mouse", None, Bus::Other, Kind::Other),
    model("usb-tablet", None, Bus::Other, Kind::Other),
    model("virtio-keyboard-pci", Some("virtio-keyboard"), Bus::Pci, Kind::Other),
    model("virtio-serial-pci", Some("virtio-serial"), Bus::Pci, Kind::Other),
    model("virtserialport", None, Bus::Other, Kind::Other),
    model("isa-serial", None, Bus::Other, Kind::Other),
    model("VGA", None, Bus::Pci, Kind::Other),
    model("cirrus-vga", None, Bus::Pci, Kind::Other),
    model("qxl-vga", None, Bus::Pci, Kind::Other),
    model("virtio-vga", None, Bus::Pci, Kind::Other),
    model("virtio-gpu-pci", Some("virtio-gpu"), Bus::Pci, Kind::Other),
    model("virtio-balloon-pci", Some("virtio-balloon"), Bus::Pci, Kind::Other),
    model("virtio-rng-pci", Some("virtio-rng"), Bus::Pci, Kind::Other),
    model("virtio-mouse-pci", Some("virtio-mouse"), Bus::Pci, Kind::Other),
    model("virtio-tablet-pci", Some("virtio-tablet"), Bus::Pci, Kind::Other),
];

/// See the file's own first line.
const PROPERTIES: &str = include_str!("properties.txt");

impl Model {
    /// The model of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.name == name || model.alias == Some(name))
    }

    /// Its properties, a line for each: `NAME=<TYPE>` and what there is to say about it. Nothing if they are not looked
    /// at.
    pub fn properties(&self) -> Option<impl Iterator<Item = &'static str>> {
        let title = format!("{} options:", self.properties?);
        let lines = PROPERTIES.lines().skip_while(move |line| *line != title).skip(1);
        Some(lines.take_while(|line| !line.is_empty()).map(str::trim_start))
    }

    /// The type of a property.
    pub fn property(&self, name: &str) -> Option<&'static str> {
        self.properties()?.find_map(|line| {
            let (found, rest) = line.split_once("=<")?;
            (found == name)
                .then(|| rest.split_once("> ").map_or(rest.strip_suffix('>').unwrap_or(rest), |(ty, _)| ty))
        })
    }

    /// Whether the disk is behind a device of its own within this one.
    pub fn is_virtio(&self) -> bool {
        self.bus == Bus::Pci && self.kind == Kind::Disk
    }

    /// Whether there is a disk behind it, now or later.
    pub fn has_disk(&self) -> bool {
        matches!(self.kind, Kind::Disk | Kind::Cd)
    }

    /// The answer to `-device MODEL,help`.
    pub fn help(&self) -> String {
        let mut text = format!("{} options:\n", self.name);
        for line in self.properties().into_iter().flatten() {
            text.push_str(&format!("  {line}\n"));
        }
        text
    }
}

/// The names of all models.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().flat_map(|model| [Some(model.name), model.alias]).flatten()
}

/// The answer to `-device help`.
pub fn help() -> String {
    let mut text = String::new();
    let mut list = |title: &str, listed: &dyn Fn(&Model) -> bool| {
        text.push_str(&format!("{title}:\n"));
        for model in MODELS.iter().filter(|model| listed(model)) {
            text.push_str(&format!("name \"{}\", bus {}", model.name, model.bus.as_str()));
            if let Some(alias) = model.alias {
                text.push_str(&format!(", alias \"{alias}\""));
            }
            if let Some(words) = model.text {
                text.push_str(&format!(", desc \"{words}\""));
            }
            text.push('\n');
        }
    };
    let carries_disks = |kind| matches!(kind, Kind::Controller(Bus::Scsi | Bus::Ide, _));
    list("Storage devices", &|model| model.has_disk() || carries_disks(model.kind));
    list("\nAccepted without effect", &|model| !model.has_disk() && !carries_disks(model.kind));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_their_properties() {
        let model = Model::find("virtio-blk").expect("an alias");
        assert_eq!(model.name, "virtio-blk-pci");
        assert_eq!(model.property("drive"), Some("str"));
        assert_eq!(model.property("iothread"), Some("link<iothread>"));
        assert_eq!(model.property("serial"), Some("str"));
        assert_eq!(model.property("nope"), None);
        assert_eq!(model.properties().expect("known").count(), 79);
        assert_eq!(Model::find("scsi-cd").expect("known").property("lun"), Some("uint32"));
        assert!(Model::find("nope").is_none());
        for model in MODELS.iter().filter(|model| model.has_disk()) {
            assert!(model.property("drive").is_some(), "{}", model.name);
        }
    }
}
