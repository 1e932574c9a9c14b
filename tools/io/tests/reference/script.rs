//! Scripts of shell commands that are run twice, once with our programs and once with the reference's, and compared.
//!
//! `= NAME` begins a case in two empty folders, one for each side. `$ …` prepares it, with the reference's programs
//! on both sides; `% …` looks with the reference's programs at what is there, which must be the same on both sides.
//! Every other line is run with the programs under test: what it prints to both outputs and its exit
//! status are compared, and at the end of the case the images in the two folders. What depends on time is blanked.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// An example of the crate whose tests these are. (`cargo test --test …` does not build it anew; without it does.)
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this program has a path");
    let folder = test.parent().and_then(Path::parent).expect("in a target folder");
    folder.join("examples").join(name)
}

/// Whether the reference's programs are all there; says so if not.
pub fn has(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &&&str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    match programs.iter().find(|name| !found(name)) {
        Some(missing) => {
            eprintln!("skipped: {missing} is not installed");
            false
        }
        None => true,
    }
}

/// One side: a folder to work in, and where programs are looked for.
struct Side {
    folder: PathBuf,
    path: String,
}

/// What scripts may use beside programs: a server in the background, waiting until its process is over (and its image
/// free), waiting until one answers; an image that somebody else has open meanwhile; a filter for how much room files
/// take up; how the reference's daemon finds the bitmaps of an image, bits and all; a bitmap (by its place in the
/// directory, where names have one letter) that looks as if its image had not been closed; and an image that looks as
/// if a program that knows no bitmaps had written to it. Nothing is waited for for ever, and no server is left.
const HELPERS: &str = r#"
serve() { qemu-nbd --fork --pid-file=pid -k "$PWD/s" "$@" && server=$(cat pid); }
gone() { timeout 10 sh -c "while test -e /proc/$server/exe; do sleep 0.01; done"; }
over() { gone || { kill $server; gone; } || { kill -9 $server; gone; }; }
ready() { timeout 10 sh -c "until qemu-nbd -L -k '$PWD/s' > /dev/null 2>&1; do sleep 0.01; done"; }
held() { mkfifo input; qemu-io "$1" < input > held & exec 3> input; echo length >&3
         timeout 10 sh -c "until grep -qs MiB held; do sleep 0.01; done"; }
free() { exec 3>&-; wait; rm input held; }
said() {
    { echo '{"execute":"qmp_capabilities"}{"execute":"query-named-block-nodes"}'
      sha='{"execute":"x-debug-block-dirty-bitmap-sha256","arguments":{"node":"n","name":"\1"}}'
      qemu-img info "$1" | sed -n "s/^ *name: \(.*\)/$sha/p"
      echo '{"execute":"quit"}'
    } | qemu-storage-daemon --chardev stdio,id=m --monitor m \
          --blockdev driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename="$1" |
        tr '{' '\n' | grep -e recording -e sha256 -e desc | sed 's/}.*//'
}
flagged() { printf '\3' | dd of="$1" bs=1 conv=notrunc 2> /dev/null \
              seek=$(($(od -An -tu8 --endian=big -j 528 -N 8 "$1") + 32 * $2 + 15)); }
stale() { printf '\0' | dd of="$1" bs=1 seek=95 conv=notrunc 2> /dev/null; }
blind() { sed 's/\(disk size: \|file length: \|"actual-size": \).*/\1/'; }
"#;

fn shell(folder: &Path, path: &str, line: &str) -> Output {
    let mut command = Command::new("timeout");
    command
        .args(["60", "sh", "-c", &format!("{HELPERS}{line}")])
        .current_dir(folder)
        .env("PATH", path)
        .env("LC_ALL", "C");
    command.output().expect("a shell")
}

/// What a command showed, without times and without the folder's name.
fn shown(output: &Output, folder: &Path) -> String {
    let clean = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).replace(&*folder.to_string_lossy(), "FOLDER");
        text.lines().map(|line| blanked(line) + "\n").collect::<String>()
    };
    format!(
        "status {:?}\n{}--- errors\n{}",
        output.status.code(),
        clean(&output.stdout),
        clean(&output.stderr)
    )
}

/// Without times and rates.
fn blanked(line: &str) -> String {
    if line.ends_with(" ops/sec)")
        && let Some((count, _)) = line.split_once("; ")
    {
        return format!("{count}; TIME");
    }
    let fields: Vec<_> = line.split(',').collect();
    match fields.as_slice() {
        [bytes, operations, time, _, _] if time.contains(':') => format!("{bytes},{operations},TIME"),
        _ => line.to_owned(),
    }
}

/// Runs all cases of a script; `ours` stands in for the reference's program of that name.
pub fn run(script: &str, name: &str, ours: &Path) {
    assert!(ours.is_file(), "{} is not built", ours.display());
    let root = tempfile::tempdir().expect("a folder");
    let programs = root.path().join("programs");
    std::fs::create_dir(&programs).expect("a folder");
    symlink(ours, programs.join(name)).expect("a link");
    let reference = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{reference}", programs.display());
    let mut differences = String::new();
    for (number, case) in script.split("\n= ").skip(1).enumerate() {
        let (title, lines) = case.split_once('\n').unwrap_or((case, ""));
        let side = |kind: &str, path: &str| {
            let folder = root.path().join(format!("{kind}{number}"));
            std::fs::create_dir(&folder).expect("a folder");
            Side { folder, path: path.to_owned() }
        };
        let (mine, theirs) = (side("a", &path), side("b", &reference));
        for line in lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(line) = line.strip_prefix("$ ") {
                for side in [&mine, &theirs] {
                    let done = shell(&side.folder, &reference, line);
                    assert!(done.status.success(), "{line}: {done:?}");
                }
                continue;
            }
            let (line, programs) = match line.strip_prefix("% ") {
                Some(line) => (line, [&reference; 2]),
                None => (line, [&mine.path, &theirs.path]),
            };
            let [our, their] = [(&mine, programs[0]), (&theirs, programs[1])]
                .map(|(side, path)| shown(&shell(&side.folder, path, line), &side.folder));
            if our != their {
                differences += &format!("\n{title}: {line}\n{}", apart(&our, &their));
            }
        }
        differences += &compare_images(title, &mine.folder, &theirs.folder);
    }
    assert!(differences.is_empty(), "{differences}");
}

/// Where two texts differ: without what both begin and end with, but for a few lines.
fn apart(our: &str, their: &str) -> String {
    const AROUND: usize = 2;
    let [our, their] = [our, their].map(|text| text.lines().collect::<Vec<_>>());
    let same = our.iter().zip(&their).take_while(|(our, their)| our == their).count();
    let tail = our[same..].iter().rev().zip(their[same..].iter().rev());
    let tail = tail.take_while(|(our, their)| our == their).count();
    let cut = |lines: &[&str]| {
        let end = (lines.len() - tail + AROUND).min(lines.len());
        lines[same.saturating_sub(AROUND)..end].join("\n")
    };
    format!("### ours, from line {}:\n{}\n### theirs:\n{}\n", same + 1, cut(&our), cut(&their))
}

fn compare_images(title: &str, mine: &Path, theirs: &Path) -> String {
    let mut differences = String::new();
    for entry in std::fs::read_dir(theirs).expect("the folder").flatten() {
        let name = entry.file_name();
        let format = match Path::new(&name).extension().and_then(|end| end.to_str()) {
            Some("raw") => "raw",
            Some("qcow2") => "qcow2",
            _ => continue,
        };
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-U", "-f", format, "-F", format]).arg(mine.join(&name)).arg(entry.path());
        let done = compare.output().expect("qemu-img runs");
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stdout);
            differences += &format!("\n{title}: {} differs: {said}", name.to_string_lossy());
        }
    }
    differences
}

/// A few numbers that look random and are always the same.
pub struct Numbers(pub u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// A command on a disk of this many bytes.
    pub fn command(&mut self, size: u64) -> String {
        let unit = match self.below(4) {
            0 => 1,
            1 => 512,
            2 => 4096,
            _ => 65536,
        };
        let at = self.below(size / unit) * unit;
        let length = (self.below(12) + 1) * unit;
        let length = length.min(size - at);
        let byte = self.below(256);
        match self.below(12) {
            0..4 => format!("write -P {byte} {at} {length}"),
            4 => format!("write -z {at} {length}"),
            5 => format!("write -zu {at} {length}"),
            6 => format!("discard {at} {length}"),
            7 => format!("writev -P {byte} {at} {} {length}", length.min(size - at - length)),
            8 => format!("aio_write -P {byte} {at} {length}\naio_flush"),
            9 => format!("alloc {at} {length}"),
            10 => format!("read -v {at} {}", length.min(64)),
            _ => "flush".to_owned(),
        }
    }
}
