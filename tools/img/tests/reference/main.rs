//! The same command lines on our program and on qemu-img: the same output, exit status and images.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

#[path = "../../../io/tests/reference/script.rs"]
mod script;

#[path = "../../../io/tests/reference/loops.rs"]
mod loops;

fn compare(script: &str) {
    if script::has(&["qemu-img", "qemu-io"]) {
        script::run(script, "qemu-img", &script::example("qemu-img"));
    }
}

/// Our program, in a folder: its exit status, and what it prints to both outputs.
fn ours(folder: &Path, line: &str) -> (Option<i32>, String, String) {
    let mut program = Command::new(script::example("qemu-img"));
    let done = program.args(line.split(' ')).current_dir(folder).output().expect("our program");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
fn command_lines() {
    compare(include_str!("../scripts/command_lines.txt"));
}

#[test]
fn amend() {
    compare(include_str!("../scripts/amend.txt"));
}

/// What version 2 could only say in part, or not at all, is refused rather than lost. (The reference loses it.)
#[test]
fn not_amended() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |line: &str| {
        let (status, _, complaints) = ours(folder.path(), line);
        (status, complaints)
    };
    for (name, line, why) in [
        ("zstd", "create -q -f qcow2 -o compression_type=zstd zstd 1M", "incompatible features 0x8 set"),
        ("bitmaps", "bitmap --add bitmaps b", "persistent bitmaps"),
        ("snapshots", "snapshot -c s snapshots", "internal snapshots"),
    ] {
        if name != "zstd" {
            assert_eq!(run(&format!("create -q -f qcow2 {name} 1M")).0, Some(0));
        }
        assert_eq!(run(line), (Some(0), String::new()), "{line}");
        let before = std::fs::read(folder.path().join(name)).expect("an image");
        let (status, said) = run(&format!("amend -o compat=v2 {name}"));
        assert_eq!(status, Some(1));
        assert!(said.contains("Cannot downgrade an image with") && said.contains(why), "{said}");
        // That the bitmaps are in use was noted when it was opened.
        let after = std::fs::read(folder.path().join(name)).expect("an image");
        assert!(after == before || name == "bitmaps", "{name}");
        assert_eq!(run(&format!("check -q {name}")), (Some(0), String::new()));
    }
    let (status, said) = run("amend -o refcount_bits=8 zstd");
    assert_eq!(status, Some(1));
    assert!(said.contains("Changing refcount_bits is not supported"), "{said}");
}

/// An image of version 3 whose snapshot table lacks what that version asks for can be used; the repair is of the table
/// alone, and leaves the bitmaps as they are. (The reference's makes them inconsistent.)
#[test]
fn an_incomplete_snapshot_table() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |line: &str| {
        let (status, said, _) = ours(folder.path(), line);
        (status, said)
    };
    for line in ["create -q -f qcow2 a 1M", "snapshot -c s a", "bitmap --add a b"] {
        assert_eq!(run(line), (Some(0), String::new()), "{line}");
    }
    let file = File::options().read(true).write(true).open(folder.path().join("a")).expect("an image");
    let mut table = [0; 8];
    file.read_exact_at(&mut table, 64).expect("a header");
    // The name moves to where the extra data was, and what follows is not looked at.
    file.write_all_at(&8_u32.to_be_bytes(), u64::from_be_bytes(table) + 36).expect("a table");
    assert_eq!(run("check -q a").0, Some(2));
    // Not closed cleanly, it is repaired when it is opened for writing.
    file.write_all_at(&[1], 79).expect("a header");
    assert_eq!(run("resize -q a 1M").0, Some(0));
    assert_eq!(run("check -q -r all a").0, Some(0));
    assert_eq!(run("check -q a"), (Some(0), String::new()));
    let info = run("info a").1;
    assert!(info.contains("name: b") && !info.contains("in-use"), "{info}");
}

#[test]
fn create_info_map() {
    compare(include_str!("../scripts/create_info_map.txt"));
}

#[test]
fn check() {
    compare(include_str!("../scripts/check.txt"));
}

#[test]
fn convert_compare() {
    compare(include_str!("../scripts/convert_compare.txt"));
}

#[test]
fn map() {
    compare(include_str!("../scripts/map.txt"));
}

#[test]
fn names() {
    compare(include_str!("../scripts/names.txt"));
}

#[test]
fn measure() {
    compare(include_str!("../scripts/measure.txt"));
}

#[test]
fn dd() {
    compare(include_str!("../scripts/dd.txt"));
}

/// The reference makes the output first, and there is nothing left to read.
#[test]
fn dd_onto_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("a.raw"), [7; 1024]).expect("a file");
    std::fs::create_dir(folder.path().join("sub")).expect("a folder");
    for output in ["of=a.raw", "of=sub/../a.raw", "of=file:a.raw"] {
        let mut program = Command::new(script::example("qemu-img"));
        program.args(["dd", "-f", "raw", "if=a.raw", output]).current_dir(&folder);
        let done = program.output().expect("our program");
        assert_eq!(done.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&done.stderr).ends_with("input and output are the same file\n"));
        assert_eq!(std::fs::read(folder.path().join("a.raw")).expect("a file"), [7; 1024]);
    }
}

#[test]
fn internal_snapshots() {
    compare(include_str!("../scripts/internal_snapshots.txt"));
}

#[test]
fn snapshot() {
    compare(include_str!("../scripts/snapshot.txt"));
}

#[test]
fn image_opts() {
    compare(include_str!("../scripts/image_opts.txt"));
}

/// A command that is refused has not emptied the image that was there. (The reference removes it.)
#[test]
fn what_cannot_be_made_leaves_what_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |line: &str| {
        let mut program = Command::new(script::example("qemu-img"));
        let done = program.args(line.split(' ')).current_dir(&folder).output().expect("our program");
        done.status.code()
    };
    assert_eq!(run("create -q -f qcow2 a 1M"), Some(0));
    let before = std::fs::read(folder.path().join("a")).expect("an image");
    for options in
        ["cluster_size=3", "nocow=on,cluster_size=3", "nocow=on,refcount_bits=5", "extent_size_hint=8G"]
    {
        assert_eq!(run(&format!("create -q -f qcow2 -o {options} a 1M")), Some(1), "{options}");
        assert_eq!(std::fs::read(folder.path().join("a")).expect("an image"), before, "{options}");
    }
}

/// The help of each command names all options that the reference's names, but for those that we do not have.
#[test]
fn help_of_commands() {
    if !script::has(&["qemu-img"]) {
        return;
    }
    // Some are misspelt there, or not taken.
    const NOT_OURS: [&str; 2] = ["--object", "--progres"];
    let letter = |word: &str| word.len() == 2 && word.starts_with('-') && word != "-h,";
    for command in
        "amend bitmap check commit compare convert create dd info map measure rebase resize snapshot"
            .split(' ')
    {
        let theirs = Command::new("qemu-img").args([command, "--help"]).output().expect("qemu-img");
        let theirs = String::from_utf8_lossy(&theirs.stdout).into_owned();
        let (status, our, _) = ours(Path::new("."), &format!("{command} --help"));
        assert_eq!(status, Some(0));
        let all = theirs.lines().filter(|line| line.trim_start().starts_with('-'));
        for word in
            all.flat_map(|line| line.split([' ', ','])).filter(|word| word.starts_with("--") || letter(word))
        {
            let is_not_ours = NOT_OURS.contains(&word) || (command, word) == ("measure", "-s");
            let is_told = our.split([' ', ',', '\n']).any(|told| told == word);
            assert!(is_told || is_not_ours, "{command} {word}:\n{our}");
        }
    }
}

/// Nothing is left of a new image that cannot be made; of a raw one an empty file, and what was copied before an error
/// stays, as with the reference. What was there is empty, and not half an image.
#[test]
fn nothing_half_made_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let left = || std::fs::metadata(folder.path().join("x")).map(|found| found.len()).ok();
    std::fs::write(folder.path().join("src"), [1; 200_000]).expect("a file");
    // In units of 512 bytes.
    for (blocks, line, there, rest) in [
        (300, "create -q -f qcow2 -o preallocation=full x 4G", false, None),
        (300, "create -q -f qcow2 -o preallocation=full,nocow=on x 4G", false, None),
        (10, "create -q -f qcow2 x 4G", false, None),
        (10, "create -q -f qcow2 x 4G", true, Some(0)),
        (300, "create -q -f raw x 4G", false, Some(0)),
        (10, "convert -f raw -O qcow2 src x", false, None),
        (400, "convert -f raw -O qcow2 -o preallocation=full src x", false, None),
        (400, "convert -f raw -O qcow2 src x", false, Some(196_616)),
        (10, "dd -f raw -O qcow2 if=src of=x", false, None),
    ] {
        match there {
            true => std::fs::write(folder.path().join("x"), "there").expect("a file"),
            false => drop(std::fs::remove_file(folder.path().join("x"))),
        }
        let (status, text) = shell(folder.path(), &format!("ulimit -f {blocks}; qemu-img {line}"));
        assert!(status == Some(1) && text.contains("too large"), "{line}: {text}");
        assert_eq!(left(), rest, "{line}");
        if line.contains("create -q -f qcow2") {
            assert!(text.ends_with("for file format 'qcow2' (try using a larger cluster size)\n"), "{text}");
        }
    }
    // The file goes, not a link that led nowhere before.
    std::os::unix::fs::symlink("y", folder.path().join("link")).expect("a link");
    assert_eq!(shell(folder.path(), "ulimit -f 10; qemu-img create -q -f qcow2 link 4G").0, Some(1));
    assert!(folder.path().join("link").is_symlink() && !folder.path().join("y").exists());
}

/// Where an image cannot be written to, it cannot be closed as it should be either: that comes second.
#[test]
fn the_cause_comes_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |line: &str| shell(folder.path(), line);
    let made = "qemu-img create -q -f qcow2 a 4M && qemu-img create -q -f raw r 4M && yes | head -c 4M > r && \
                qemu-img create -q -f qcow2 -b r -F raw b && qemu-img bitmap --add b x";
    assert_eq!(run(made), (Some(0), String::new()));
    let (status, text) = run("ulimit -f $(($(stat -c %s b) / 512 + 1)); qemu-img rebase -b a -F qcow2 b");
    let mut lines = text.lines();
    assert_eq!(
        (status, lines.next()),
        (Some(1), Some("qemu-img: Error while writing to COW image: File too large"))
    );
    assert!(lines.next().is_some_and(|line| line.contains("Lost persistent bitmaps")), "{text}");
    assert_eq!(lines.next(), None, "{text}");
}

/// An image is not made in the place of one that its backing file leads to, whatever it is called, and not in the place
/// of one that is read. (The reference empties it.)
#[test]
fn what_is_below_is_not_destroyed() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |line: &str| shell(folder.path(), line);
    let made = "qemu-img create -q -f qcow2 base 1M && qemu-img create -q -f qcow2 -b base -F qcow2 mid && \
                qemu-img create -q raw 64k && ln base hard && ln -s base soft && ln mid m && mkdir d && ln -s ../base d/up";
    assert_eq!(run(made), (Some(0), String::new()));
    let before = ["base", "mid"].map(|name| std::fs::read(folder.path().join(name)).expect("an image"));
    for line in [
        "create -f qcow2 -b base -F qcow2 base",
        "create -f qcow2 -b mid -F qcow2 base",
        "create -f qcow2 -b mid -F qcow2 hard",
        "create -f qcow2 -b mid -F qcow2 soft",
        "create -f qcow2 -b base -F qcow2 hard",
        "create -f qcow2 -b ../mid -F qcow2 d/up",
        "create -f qcow2 -b mid -F qcow2 file:base 4M",
        "create -f qcow2 -u -b base -F qcow2 soft 1M",
        "create -f qcow2 -u -b file:hard -F qcow2 base 1M",
        "convert -f raw -O qcow2 -B base -F qcow2 raw hard",
        "convert -f raw -O qcow2 -B mid -F qcow2 raw base",
        "convert -f raw -O qcow2 -B mid -F qcow2 raw m",
        "convert -U -O raw mid base",
        "dd -U -O raw if=mid of=hard",
    ] {
        let (status, text) = run(&format!("qemu-img {line}"));
        let why = if line.contains(" -U ") { "same file\n" } else { "same filename as the backing file\n" };
        assert!(status == Some(1) && text.ends_with(why), "{line}: {text}");
        let after = ["base", "mid"].map(|name| std::fs::read(folder.path().join(name)).expect("an image"));
        assert!(after == before, "{line}");
    }
    // What only looks alike is no obstacle.
    assert_eq!(
        run("qemu-img create -q -f qcow2 -b ../mid -F qcow2 d/base && qemu-img check -q d/base").0,
        Some(0)
    );
}

#[test]
fn devices() {
    if loops::can_be_made() {
        compare(include_str!("../scripts/devices.txt"));
    }
}

#[test]
fn nbdkit() {
    if script::has(&["nbdkit"]) {
        compare(include_str!("../scripts/nbdkit.txt"));
    }
}

#[test]
fn everyday() {
    compare(include_str!("../scripts/everyday.txt"));
}

#[test]
fn options() {
    compare(include_str!("../scripts/options.txt"));
}

#[test]
fn bitmap() {
    if script::has(&["qemu-storage-daemon"]) {
        compare(include_str!("../scripts/bitmap.txt"));
    }
}

#[test]
fn nbd() {
    if script::has(&["qemu-nbd"]) {
        compare(include_str!("../scripts/nbd.txt"));
    }
}

#[test]
fn resize_rebase_commit() {
    compare(include_str!("../scripts/resize_rebase_commit.txt"));
}

/// Our program in a shell: the exit status, and what it says on standard error.
fn shell(folder: &std::path::Path, line: &str) -> (Option<i32>, String) {
    let mut shell = Command::new("sh");
    let line = line.replace("qemu-img", &script::example("qemu-img").to_string_lossy());
    let done = shell.args(["-c", &line]).current_dir(folder).output().expect("a shell");
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
}

/// A count of snapshots that cannot be: those that are there stay. (The reference makes up as many as there can be.)
#[test]
fn more_snapshots_than_there_can_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let (status, text) = shell(
        folder.path(),
        "qemu-img create -q -f qcow2 a.qcow2 1M && qemu-img snapshot -c one a.qcow2 && qemu-img snapshot -c two a.qcow2 && \
         printf '\\7\\0\\0\\2' | dd of=a.qcow2 bs=1 seek=60 conv=notrunc status=none; \
         qemu-img check -r all -q a.qcow2 && qemu-img check -q a.qcow2 && qemu-img snapshot -l a.qcow2 | grep -c ' one \\| two ' >&2",
    );
    assert_eq!((status, text.as_str()), (Some(0), "Discarding 117440512 overhanging snapshots\n2\n"));
}

/// On a full disk an image cannot keep its bitmaps: that is said, and the image is sound. (The reference says it in
/// other words.)
#[test]
fn bitmaps_that_cannot_be_stored() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |line: &str| shell(folder.path(), line);
    assert_eq!(
        run("qemu-img create -q -f qcow2 a.qcow2 64M && qemu-img bitmap --add a.qcow2 old").0,
        Some(0)
    );
    // In units of 512 bytes: as long as it is.
    let full = "ulimit -f $(($(stat -c %s a.qcow2) / 512 + 1)); qemu-img bitmap --add a.qcow2 new";
    let (status, text) = run(full);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("Lost persistent bitmaps during inactivation of node '"), "{text}");
    let (status, text) =
        run("qemu-img check -q a.qcow2 && qemu-img info a.qcow2 | grep -A2 flags | grep in-use >&2");
    assert_eq!((status, text.trim()), (Some(0), "[0]: in-use"));
}

/// What we do not have is refused by its name, and nothing is made.
#[test]
fn refused_options() {
    let folder = tempfile::tempdir().expect("a folder");
    for (line, status, option) in [
        ("create -f qcow2 --object secret,id=a,data=b x 1M", 1, "--object"),
        ("amend --object secret,id=a,data=b -o size=1M x", 1, "--object"),
        ("info --object secret,id=a,data=b x", 1, "--object"),
        ("check --object secret,id=a,data=b x", 1, "--object"),
        ("map --object secret,id=a,data=b x", 1, "--object"),
        ("compare --object secret,id=a,data=b x y", 2, "--object"),
        ("convert --object secret,id=a,data=b y x", 1, "--object"),
        ("resize --object secret,id=a,data=b x 1M", 1, "--object"),
        ("rebase --object secret,id=a,data=b x", 1, "--object"),
        ("commit --object secret,id=a,data=b x", 1, "--object"),
        ("snapshot --object secret,id=a,data=b x", 1, "--object"),
        ("measure --object secret,id=a,data=b x", 1, "--object"),
        ("dd --object secret,id=a,data=b if=x of=y", 1, "--object"),
        ("bitmap --add --object secret,id=a,data=b x y", 1, "--object"),
    ] {
        let mut program = Command::new(script::example("qemu-img"));
        let output = program.args(line.split(' ')).current_dir(&folder).output().expect("our program");
        let text = format!("qemu-img: option '{option}' is not supported by this version of Underlay\n");
        assert_eq!(String::from_utf8_lossy(&output.stderr), text, "{line}");
        assert_eq!(output.status.code(), Some(status), "{line}");
        assert!(!folder.path().join("x").exists(), "{line}");
    }
}

/// Images that random writes have left are copied, committed and put on another base.
#[test]
fn random_images() {
    const MAKE: [&str; 4] = [
        "-b base.qcow2 -F qcow2 a.qcow2 4M",
        "-o cluster_size=512 -b base.qcow2 -F qcow2 a.qcow2 4M",
        "-o extended_l2=on -b base.qcow2 -F qcow2 a.qcow2 4M",
        "-o compat=0.10,cluster_size=4k -b base.qcow2 -F qcow2 a.qcow2 3500k",
    ];
    let mut script = String::new();
    for (number, make) in MAKE.into_iter().enumerate() {
        let mut numbers = script::Numbers(number as u64 + 7);
        let mut commands = || (0..40).map(|_| numbers.command(3 << 20)).collect::<Vec<_>>().join("\\n");
        script += &format!(
            "\n= {make}\n\
             $ qemu-img create -q -f qcow2 base.qcow2 4M; qemu-img create -q -f qcow2 other.qcow2 5M\n\
             $ printf '{}' | qemu-io -d unmap base.qcow2\n\
             $ printf '{}' | qemu-io -d unmap other.qcow2\n\
             $ qemu-img create -q -f qcow2 {make}\n\
             $ printf '{}' | qemu-io -d unmap a.qcow2; cp a.qcow2 c.qcow2; cp a.qcow2 f.qcow2\n\
             qemu-img map --output=json a.qcow2\n\
             qemu-img info --output=json a.qcow2 | grep -v actual-size\n\
             qemu-img check a.qcow2\n\
             qemu-img check --output=json base.qcow2\n\
             qemu-img compare a.qcow2 base.qcow2\n\
             qemu-img compare base.qcow2 other.qcow2\n\
             qemu-img convert -O qcow2 a.qcow2 b.qcow2\n\
             qemu-img convert -O qcow2 -c -B base.qcow2 -F qcow2 a.qcow2 d.qcow2\n\
             qemu-img convert -O raw a.qcow2 b.raw\n\
             qemu-img rebase -b other.qcow2 -F qcow2 c.qcow2\n\
             qemu-img rebase -b '' f.qcow2\n\
             qemu-img commit a.qcow2\n\
             % for i in a b c d f base; do qemu-img check -q $i.qcow2; qemu-img compare b.raw $i.qcow2; done\n",
            commands().replace('\n', "\\n"),
            commands().replace('\n', "\\n"),
            commands().replace('\n', "\\n"),
        );
    }
    compare(&script);
}

/// Ours alone: the bitmaps of a raw disk, beside it, are true after whatever our tools do to it, or inconsistent.
#[test]
fn bitmaps_of_a_raw_disk() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |words: &str| {
        let mut program = Command::new(script::example("qemu-img"));
        let output = program.args(words.split(' ')).current_dir(&folder).output().expect("runs");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let done = |words: &str| assert_eq!(run(words), (true, String::new()), "{words}");
    let side = folder.path().join("disk.bitmaps");
    for (name, byte) in [("disk", 0), ("src", 7)] {
        std::fs::write(folder.path().join(name), vec![byte; 1 << 20]).expect("a disk");
    }
    done("bitmap --add -f raw disk b");
    assert!(side.is_file());
    let is_good = || run("bitmap --enable -f raw disk b");
    for change in [
        "convert -n -f raw -O raw src disk",
        "resize -q -f raw disk 2M",
        "create -q -f qcow2 -b disk -F raw top.qcow2",
        "convert -n -f raw -O qcow2 src top.qcow2",
        "commit -q top.qcow2",
        "resize -q -f raw --shrink disk 1M",
    ] {
        done(change);
        assert_eq!(is_good(), (true, String::new()), "{change}");
    }
    done("create -q -f raw disk 1M");
    let (_, said) = is_good();
    assert!(said.contains("Bitmap 'b' is inconsistent"), "{said}");
    done("bitmap --remove -f raw disk b");
    assert!(!side.exists());
}

#[test]
fn random() {
    compare(include_str!("../scripts/random.txt"));
}
