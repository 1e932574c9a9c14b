//! `-o help`: the options that an image can be made with. Texts are the reference's; options that we refuse are not
//! told.

use underlay_drivers::options::DriverSpec;
use underlay_drivers::{NodeSpec, names};
use underlay_sys::say;

use crate::{Failure, Outcome};

/// Name, type and text of an option.
type Row = (&'static str, &'static str, &'static str);

const FLAG: &str = "bool (on/off)";
const SIZE: Row = ("size", "size", "Virtual disk size");

/// Sorted by name, as they are printed.
const QCOW2: [Row; 10] = [
    ("backing_file", "str", "File name of a base image"),
    ("backing_fmt", "str", "Image format of the base image"),
    ("cluster_size", "size", "qcow2 cluster size"),
    ("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("compression_type", "str", "Compression method used for image cluster compression"),
    ("extended_l2", FLAG, "Extended L2 tables"),
    ("lazy_refcounts", FLAG, "Postpone refcount updates"),
    ("preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    ("refcount_bits", "num", "Width of a reference count entry in bits"),
    SIZE,
];

/// What a local file adds to the options of a format that does not have them.
const FILE: [Row; 3] = [
    ("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    ("nocow", FLAG, "Turn off copy-on-write (valid only on btrfs)"),
    ("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
];

/// What a device adds to them.
const DEVICE: [Row; 1] = [("preallocation", "str", "Preallocation mode (allowed values: off)")];

/// Whether a list of options asks for help.
pub fn is_asked(list: &str) -> bool {
    list.replace(",,", "\0").split(',').any(|word| matches!(word, "help" | "?"))
}

/// Prints the options of a format; with the name of the image also those of where it is stored.
pub fn print(format: &str, name: Option<&str>) -> Outcome {
    let mut rows = match format {
        "qcow2" => QCOW2.to_vec(),
        "raw" => vec![SIZE],
        other => return Err(Failure::new(format!("Unknown file format '{other}'"))),
    };
    match name {
        None => say!("Supported {format} options:"),
        Some(name) => {
            if stored_in_file(name)? {
                let own = rows.clone();
                let adds: &[Row] = if is_device(name) { &DEVICE } else { &FILE };
                rows.extend(adds.iter().filter(|(name, _, _)| own.iter().all(|(known, _, _)| known != name)));
                rows.sort_unstable();
            }
            say!("Supported options:");
        }
    }
    print_rows(rows);
    if name.is_none() {
        say!(
            "\nThe protocol level may support further options.\n\
             Specify the target filename to include those options."
        );
    }
    Ok(())
}

/// Options that `amend` can change.
const AMENDABLE: [&str; 6] =
    ["backing_file", "backing_fmt", "compat", "lazy_refcounts", "refcount_bits", "size"];

/// Prints what can be amended of an image of this format.
pub fn print_amendable(format: &str) -> Outcome {
    match format {
        "qcow2" => {
            say!("Amend options for 'qcow2':");
            print_rows(QCOW2.into_iter().filter(|(name, _, _)| AMENDABLE.contains(name)));
            Ok(())
        }
        "raw" | "file" | "host_device" | "nbd" | "null-co" | "null-aio" | "throttle" | "copy-on-read" => {
            Err(Failure::new(format!("Format driver '{format}' does not support option amendment")))
        }
        other => Err(Failure::new(format!("Unknown file format '{other}'"))),
    }
}

fn print_rows(rows: impl IntoIterator<Item = Row>) {
    for (name, kind, text) in rows {
        say!("  {:<22} - {text}", format!("{name}=<{kind}>"));
    }
}

/// Whether a name is that of a local file; else it is that of an NBD export.
pub fn stored_in_file(name: &str) -> Result<bool, Failure> {
    match name.split(':').next().filter(|_| names::has_protocol(name)) {
        None | Some("file") => Ok(true),
        Some("nbd" | "nbd+tcp" | "nbd+unix") => Ok(false),
        Some(null @ ("null-co" | "null-aio")) => {
            Err(Failure::new(format!("Protocol driver '{null}' does not support image creation")))
        }
        Some(other) => Err(Failure::new(format!("Unknown protocol '{other}'"))),
    }
}

/// Whether a name of a local file is that of a device.
pub fn is_device(name: &str) -> bool {
    matches!(NodeSpec::file(name).driver, DriverSpec::File(file) if file.driver == "host_device")
}

#[cfg(test)]
mod tests {
    use super::is_asked;

    #[test]
    fn help_is_a_word_of_its_own() {
        for (list, asked) in [
            ("help", true),
            ("?", true),
            ("a=b,help", true),
            ("a=,,help", false),
            ("helpx", false),
            ("x=help", false),
        ] {
            assert_eq!(is_asked(list), asked, "{list}");
        }
    }
}
