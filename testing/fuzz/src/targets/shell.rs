//! The shell, from both sides. What is typed must come to a message that a server can read, or to an error; what a
//! server says must be understood the same however it is cut into pieces, and must not be too much for TAB.

use std::sync::LazyLock;

use underlay_qmp::client::{Client, Heard};
use underlay_qmp::json::{self, Object, Value};
use underlay_qmp::schema::Program;
use underlay_qmp::schema::introspect::query_qmp_schema;
use underlay_shell::line::{Typed, Typist};
use underlay_shell::vocabulary::Vocabulary;

static VOCABULARY: LazyLock<Vocabulary> =
    LazyLock::new(|| Vocabulary::from_schema(&query_qmp_schema(Program::Machine)));

/// Types the bytes, line by line, with TAB at the end of each.
pub fn typed(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut typist = Typist::default();
    for line in text.lines() {
        let (at, names) = VOCABULARY.complete(line, typist.is_open());
        let part = line.get(at..).expect("the end of a line");
        assert!(names.iter().all(|name| name.starts_with(part)), "{names:?} do not begin with {part:?}");
        if let Ok(Typed::Message(message)) = typist.line(line) {
            let message = Value::Object(message);
            let printed = message.as_it_came(false);
            // A number that is too large is infinite, which is the one thing that cannot be printed.
            if !printed.contains("inf") {
                let again = json::parse(printed.as_bytes()).map(|value| value.as_it_came(false));
                assert_eq!(again, Ok(printed), "what is sent must be JSON");
            }
        }
    }
}

/// Feeds the client's half of a conversation with the bytes, at once and in pieces.
pub fn heard(data: &[u8]) {
    let waiting = || {
        let mut client = Client::default();
        (0..4).for_each(|_| drop(client.execute("query-qmp-schema", Object::new())));
        client
    };
    let whole = waiting().push(data);
    let size = 1 + data.first().map_or(0, |&byte| usize::from(byte % 64));
    let mut client = waiting();
    let pieces: Result<Vec<Vec<Heard>>, _> = data.chunks(size).map(|piece| client.push(piece)).collect();
    let pieces = pieces.map(|pieces| pieces.concat());
    assert_eq!(
        format!("{whole:?}"),
        format!("{pieces:?}"),
        "pieces of {size} bytes are understood differently"
    );
    for heard in whole.into_iter().flatten() {
        let Heard::Reply(reply) = heard else { continue };
        let Ok(schema) = reply.result() else { continue };
        let vocabulary = Vocabulary::from_schema(&schema);
        for line in ["", "c ", "c a", "c a.", "c a=", "c a=v b.c.", "transaction( ", "transaction( t d"] {
            let _ = vocabulary.complete(line, false);
        }
    }
}

/// Lines as they are typed.
pub fn seeds_of_lines() -> Vec<Vec<u8>> {
    [
        "query-status\nblockdev-add driver=qcow2 node-name=n file.driver=file file.filename=/x\n",
        "nbd-server-start addr={\"type\":\"inet\",\"data\":{\"host\":\"::\",\"port\":\"49153\"}}\nquit",
        "transaction(\nblockdev-snapshot-sync node-name=a snapshot-file='b c' mode=existing\nabort )\n",
        "block-commit device=d speed=-9223372036854775808 auto-finalize=True x={'a':None,'b':[1,2.5,{}]}",
        "foo a.0=x a.1.b=null a.1.c=18446744073709551615 d= e=\"\\u20ac\" f=1_000\n# a comment\n{'execute':'x'}",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// What servers say.
pub fn seeds_of_servers() -> Vec<Vec<u8>> {
    [
        "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}}, \"capabilities\": [\"oob\"]}}\r\n\
         {\"return\": {}}\r\n{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n\
         {\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": [1]}\r\n",
        "{\"return\": [{\"name\": \"c\", \"meta-type\": \"command\", \"arg-type\": \"1\"}, {\"name\": \"1\", \
         \"meta-type\": \"object\", \"members\": [{\"name\": \"a\", \"type\": \"2\"}, {\"name\": \"b\", \"type\": \"1\"}], \
         \"tag\": \"a\", \"variants\": [{\"case\": \"v\", \"type\": \"1\"}]}, {\"name\": \"2\", \"meta-type\": \"enum\", \
         \"values\": [\"v\", \"w\"]}]}",
        "{\"return\": [{\"name\": \"transaction\", \"meta-type\": \"command\", \"arg-type\": \"1\"}, {\"name\": \"1\", \
         \"meta-type\": \"object\", \"members\": [{\"name\": \"actions\", \"type\": \"[2]\"}]}, {\"name\": \"[2]\", \
         \"meta-type\": \"array\", \"element-type\": \"2\"}, {\"name\": \"2\", \"meta-type\": \"object\", \"members\": [], \
         \"tag\": \"type\", \"variants\": [{\"case\": \"t\", \"type\": \"3\"}]}, {\"name\": \"3\", \"meta-type\": \"object\", \
         \"members\": [{\"name\": \"data\", \"type\": \"4\"}]}, {\"name\": \"4\", \"meta-type\": \"alternate\", \
         \"members\": [{\"type\": \"4\"}, {\"type\": \"1\"}, {\"type\": \"bool\"}]}, {\"name\": \"bool\", \
         \"meta-type\": \"builtin\", \"json-type\": \"boolean\"}]}",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
