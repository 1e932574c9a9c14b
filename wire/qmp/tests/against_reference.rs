//! The same bytes to our session and to the installed `qemu-storage-daemon`: every reply must be the same.
//!
//! Commands that our session would execute are compared no further. Without the program there is nothing to compare
//! with, and the tests say so.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::process::{Child, Command, Stdio};

use underlay_qmp::json::{self, Object, Value};
use underlay_qmp::schema::Program;
use underlay_qmp::schema::introspect::query_qmp_schema;
use underlay_qmp::session::{Incoming, Session};

/// Sent after each input, so that replies can be told apart.
const END: &[u8] = b"\n{\"execute\":\"nope\",\"id\":\"end\"}\n";

/// The reference's daemon with a monitor on its standard input and output; nothing if it is not there.
fn start() -> Option<Child> {
    let spawned = Command::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=c", "--monitor", "chardev=c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    match spawned {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("no qemu-storage-daemon here: nothing compared");
            None
        }
        other => Some(other.expect("the reference starts")),
    }
}

/// What the reference says to `input`, line by line without the greeting.
fn reference(input: &[u8]) -> Option<Vec<String>> {
    let mut daemon = start()?;
    let mut stdin = daemon.stdin.take().expect("piped");
    let all = [input, b"{\"execute\":\"quit\"}\n"].concat();
    let writer = std::thread::spawn(move || stdin.write_all(&all));
    let mut text = String::new();
    daemon.stdout.take().expect("piped").read_to_string(&mut text).expect("UTF-8");
    daemon.wait().expect("it ends");
    writer.join().expect("no panic").expect("written");
    Some(text.split("\r\n").skip(1).map(str::to_owned).collect())
}

/// What the reference says to `inputs`, each sent when the one before it is answered: with many requests out of band on
/// their way it may stop to listen.
fn reference_in_step(negotiation: &[u8], inputs: &[&[u8]]) -> Option<Vec<String>> {
    let mut daemon = start()?;
    let mut stdin = daemon.stdin.take().expect("piped");
    let mut stdout = BufReader::new(daemon.stdout.take().expect("piped"));
    stdin.write_all(negotiation).expect("written");
    let mut heard = Vec::new();
    for input in inputs {
        stdin.write_all(&[*input, END].concat()).expect("written");
        let mut line = String::new();
        while !line.contains("\"end\"") {
            line.clear();
            assert_ne!(stdout.read_line(&mut line).expect("UTF-8"), 0, "it ended");
            heard.push(line.trim_end().to_owned());
        }
    }
    daemon.kill().expect("it lives");
    daemon.wait().expect("it ends");
    Some(heard.split_off(1))
}

fn compare(inputs: &[&[u8]]) {
    let mut stream = b"{\"execute\":\"qmp_capabilities\"}\n".to_vec();
    for input in inputs {
        stream.extend_from_slice(input);
        stream.extend_from_slice(END);
    }
    let Some(theirs) = reference(&stream) else { return };
    let ours: Vec<_> = Session::default().push(&stream).into_iter().map(text).collect();
    let is_end = |line: &String| line.contains("\"end\"");
    let ends = |lines: &[String]| lines.iter().filter(|line| is_end(line)).count();
    let mut wrong = Vec::new();
    // A message that is not complete takes the next inputs into itself, on both sides alike.
    let pairs = ours.split(is_end).zip(theirs.split(is_end));
    for (at, (ours, theirs)) in pairs.take(ends(&ours)).enumerate() {
        // What is executed may have any outcome.
        let same = |(our, their): (&String, &String)| our == their || (our == EXECUTED && !is_refusal(their));
        if ours.len() != theirs.len() || !ours.iter().zip(theirs).all(same) {
            let input = String::from_utf8_lossy(inputs[at]);
            wrong.push(format!("{input}\n   ours {ours:?}\n theirs {theirs:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(ends(&ours), ends(&theirs));
}

const EXECUTED: &str = "executed";

fn text(incoming: Incoming) -> String {
    match incoming {
        Incoming::Reply(value) | Incoming::Urgent(value) => value.to_string(),
        Incoming::Request(_) => EXECUTED.to_owned(),
    }
}

/// Whether a reply of the reference says that it did not understand the command, so that nothing was executed.
fn is_refusal(reply: &str) -> bool {
    ["JSON", "QMP input", "Parameter 'null'", "Invalid parameter type", "is unexpected", "is missing"]
        .iter()
        .any(|sign| reply.contains(sign))
}

#[test]
fn garbage_is_answered_alike() {
    compare(&[
        b"[1]",
        b"\"x\"",
        b"12",
        b"true",
        b"foo",
        b"nul",
        b"tRue",
        b"@",
        b"}",
        b"]",
        b",",
        b":",
        b"{\"a\"}",
        b"{\"a\":}",
        b"{\"a\":1,}",
        b"{\"a\" 1}",
        b"{1:2}",
        b"{\"a\":1 \"b\":2}",
        b"[1,]",
        b"[1 2]",
        b"[,1]",
        b"{,}",
        b"01",
        b"-",
        b"-a",
        b"1.",
        b"1.e",
        b"1e",
        b"1e5",
        b"-0",
        b"99999999999999999999",
        b"1e400",
        b"1e+",
        b"1e-5",
        b"1E5",
        b"-01",
        b"0.5",
        b"0e",
        b"00",
        b"{\"id\":\"\\ud800\"}",
        b"{\"id\":\"\\ud800\\u0041\"}",
        b"{\"id\":\"\\udc00\"}",
        b"{\"id\":\"\\x\"}",
        b"{\"id\":\"\\u12\"}",
        b"{\"id\":\"\\uzzzz\"}",
        b"{\"id\":\"\\uffff\"}",
        b"{\"id\":\"\xff\"}",
        b"{\"id\":\"\xed\xa0\x80\"}",
        b"{\"id\":\"a\tb\"}",
        b"{\"id\":\"a\0b\"}",
        b"{\"id\":\"a\rb\"}",
        b"\xff{}",
        b"{\"a\":\xff{}",
        b"{\"a\n",
        b"\x0c{}",
        b"@ \"abc\" 12 true {}",
        b"@abc\"def\"{}",
        b"@abc\"def{}\"",
        b"@abc,",
        b"@abc def:",
        b"@a'b'[]",
        b"@@@",
        b"@\tq",
        b"@\nfoo{}",
        b"@\xfffoo{}",
        b"@a\rfoo{}",
        b"@\0foo{}",
        b"@\x01foo{}",
        b"Foo Bar",
        b"\"a",
        b"\"a\x01b{}\"",
        b"{\"a\":\"x\x01y\"}",
        b"{\"a\":\"x\x01y\" , {} \"z\"}",
        b"\"\xef\xbf\xbf\"",
        b"\"\xf0\x9f\xbf\xbf\"",
        b"\"\xef\xb7\x90\"",
        b"\"\xf4\x90\x80\x80\"",
        b"\"\xf8\x88\x80\x80\x80\"",
        b"\"\xc1\x81\"",
        b"\"\xfe\"",
        b"\"\x80\"",
        b"\"\\ufdd0\"",
        b"\"\\ud83f\\udfff\"",
        b"\"\\u12xyz\"",
        b"\"\\u+123\"",
        b"\"\\u1 34\"",
        b"\"\\ud83d\\udzzz\"",
        b"\"\\ud83d\\n\"",
        b"12abc",
        b"-5x",
        b"1.5x",
        b"1.5.5",
        b"1-2",
        b"nullnull",
        b"null,",
        b"_a",
        b"a_b",
        b"a1b-c",
        b"\"a\"\"b\"",
        b"'a\"'\"b\"",
        b"1 2",
        b"{\"a\":1}]{\"b\":2}",
        b"]]{}",
        b"{}}]{}",
        b"[{]}",
        b"[1,2,3,[}]",
        b"{\"a\":[1}]}",
        b"{\"a\":]",
        b"[}",
        b"{]",
        b"{\"a\":1]",
        b"{\"a\":tru}",
        b"{\"a\":True}",
        b"{\"a\":1.}",
        b"{\"a\":-}",
        b"{\"a\":+1}",
        b"{\"a\":.5}",
        b"{\"a\":0x10}",
        b"{\"a\":1a}",
        b"{\"a\":%d}",
        b"%d",
        b"{\"a\":\"\\",
        b"{\"a\":1,\"a\":2}",
        b"{\"a\"\nfoo",
        b"}",
    ]);
}

#[test]
fn limits_are_alike() {
    let deep = |n: usize| [vec![b'['; n], vec![b']'; n]].concat();
    let names = |n: usize| [b"{\"a\":".repeat(n), b"1".to_vec(), b"}".repeat(n)].concat();
    compare(&[&deep(1024), &deep(1025), &deep(1030), &names(1025)]);
}

#[test]
fn commands_are_refused_alike() {
    compare(&[
        b"{\"execute\":\"query-version\",\"foo\":1}",
        b"{\"execute\":1}",
        b"{\"execute\":null}",
        b"{\"arguments\":{}}",
        b"{}",
        b"{\"execute\":\"query-version\",\"arguments\":1}",
        b"{\"execute\":\"query-version\",\"arguments\":[]}",
        b"{\"execute\":\"query-version\",\"arguments\":null}",
        b"{\"execute\":\"query-version\",\"arguments\":{\"a\":1}}",
        b"{\"execute\":\"nope\",\"arguments\":{\"a\":1},\"id\":[1,{\"b\":null}]}",
        b"{\"exec-oob\":\"query-version\"}",
        b"{\"exec-oob\":\"query-version\",\"arguments\":1,\"id\":1}",
        b"{\"execute\":1,\"arguments\":1}",
        b"{\"execute\":1,\"foo\":1}",
        b"{\"exec-oob\":\"query-version\",\"execute\":\"query-version\"}",
        b"{\"execute\":\"x\",\"arguments\":1,\"id\":5}",
        b"{\"execute\":\"query-version\",\"control\":{}}",
        b"{\"execute\":\"qmp_capabilities\"}",
        b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"foo\":1}}",
        b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"foo\"]}}",
        b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":\"oob\"}}",
        b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[1]}}",
        b"{\"execute\":\"qmp_capabilities\",\"foo\":1}",
        b"{\"foo\":1,\"bar\":2}",
        b"{\"execute\":\"query-commands\\u00e9\"}",
        b"{\"execute\":\"nope\",\"id\":0.1}",
        b"{\"execute\":\"nope\",\"id\":1e22}",
        b"{\"execute\":\"nope\",\"id\":1.5e-7}",
        b"{\"execute\":\"nope\",\"id\":123456.789}",
        b"{\"execute\":\"nope\",\"id\":-0.0}",
        b"{\"execute\":\"nope\",\"id\":1e400}",
        b"{\"execute\":\"nope\",\"id\":99999999999999999999}",
        b"{\"execute\":\"nope\",\"id\":1e5}",
        b"{\"execute\":\"nope\",\"id\":1e16}",
        b"{\"execute\":\"nope\",\"id\":1e17}",
        b"{\"execute\":\"nope\",\"id\":0.0001}",
        b"{\"execute\":\"nope\",\"id\":0.00001}",
        "{\"execute\":\"nope\",\"id\":\"é\\u00e9😀\\u0000\\u007f\\/\\b\\f\\n\\r\\t'\"}".as_bytes(),
        b"{\"execute\":\"nope\",\"id\":\"a\xc0\x80b\x7f\"}",
        b"{'execute':'nope','id':'a\"b\\'c'}",
    ]);
}

#[test]
fn requests_out_of_band_are_refused_alike() {
    let negotiation = b"{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}\n";
    let inputs: &[&[u8]] = &[
        b"{'exec-oob':'query-version'}",
        b"{'exec-oob':'query-version','id':1}",
        b"{'exec-oob':'nope','id':1}",
        b"{'exec-oob':'nope','id':null}",
        b"{'exec-oob':'qmp_capabilities'}",
        b"{'exec-oob':1,'id':1}",
        b"{'exec-oob':null}",
        b"{'exec-oob':'quit','arguments':{'a':1}}",
        b"{'exec-oob':'quit','arguments':1}",
        b"{'exec-oob':1,'arguments':1}",
        b"{'exec-oob':1,'arguments':1,'foo':1}",
        b"{'exec-oob':'quit','arguments':1,'foo':1}",
        b"{'exec-oob':'quit','a':1,'z':1,'control':1}",
        b"{'exec-oob':'quit','execute':'quit'}",
        b"{'execute':'quit','exec-oob':'quit','id':1}",
        b"{'execute':1,'exec-oob':'quit'}",
        b"{'execute':'quit','exec-oob':1}",
        b"{'execute':1,'exec-oob':1}",
        b"{'execute':'quit','exec-oob':'quit','arguments':1}",
        b"{'execute':'quit','exec-oob':'quit','foo':1}",
        b"{'execute':1,'foo':1}",
        b"{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}",
    ];
    let Some(theirs) = reference_in_step(negotiation, inputs) else { return };
    let mut session = Session::default();
    let mut ours: Vec<_> = session.push(negotiation).into_iter().map(text).collect();
    for input in inputs {
        ours.extend(session.push(&[*input, END].concat()).into_iter().map(text));
    }
    assert_eq!(ours, theirs);
}

#[test]
fn arguments_are_refused_alike() {
    let commands = [
        "block-stream {'job-id':1}",
        "block-stream {'device':'a','speed':1.5}",
        "block-stream {'device':'a','speed':18446744073709551615}",
        "block-stream {'device':'a','speed':'1'}",
        "block-stream {'device':'a','auto-finalize':1}",
        "block-stream {'device':'a','on-error':1}",
        "block-stream {'device':null}",
        "block-stream {'device':'a','z':1,'b':2,'y':3}",
        "block-stream {}",
        "block-stream {'speed':'x','auto-dismiss':1,'job-id':1,'device':2}",
        "block-commit {'top':1,'base':1,'speed':'x','auto-dismiss':1,'job-id':1,'device':2}",
        "blockdev-add {}",
        "blockdev-add {'driver':'nope'}",
        "blockdev-add {'driver':1}",
        "blockdev-add {'driver':'file'}",
        "blockdev-add {'driver':'file','filename':1}",
        "blockdev-add {'driver':'file','filename':'a','locking':'x'}",
        "blockdev-add {'driver':'file','filename':'a','x':1}",
        "blockdev-add {'driver':'file','filename':'a','cache':1}",
        "blockdev-add {'driver':'file','filename':'a','cache':{'direct':1}}",
        "blockdev-add {'driver':'file','filename':'a','cache':{'x':true}}",
        "blockdev-add {'driver':'file','filename':'a','aio-max-batch':9223372036854775808}",
        "blockdev-add {'driver':'qcow2','file':null}",
        "blockdev-add {'driver':'qcow2','file':{}}",
        "blockdev-add {'driver':'qcow2','file':{'driver':'file','filename':'a','y':1}}",
        "blockdev-add {'driver':'qcow2','file':{'driver':'qcow2','file':{'driver':'nope'}}}",
        "blockdev-add {'driver':'qcow2','file':{'driver':'raw','file':5}}",
        "blockdev-add {'driver':'qcow2','file':{'driver':'file','filename':'a','locking':'x'}}",
        "blockdev-add {'driver':'qcow2','file':{'driver':'file','filename':'a','locking':1}}",
        "blockdev-add {'driver':'qcow2','file':{'driver':'file','filename':'a','cache':{'y':1}}}",
        "blockdev-add {'driver':'qcow2','file':'a','backing':1}",
        "blockdev-add {'driver':'qcow2','file':'a','overlap-check':1}",
        "blockdev-add {'driver':'qcow2','file':'a','overlap-check':'x'}",
        "blockdev-add {'driver':'qcow2','file':'a','overlap-check':{'x':1}}",
        "blockdev-add {'driver':'qcow2','file':'a','overlap-check':{'template':'x'}}",
        "blockdev-add {'driver':'qcow2','file':'a','l2-cache-size':'x'}",
        "blockdev-add {'driver':'null-co','size':1.5}",
        "blockdev-add {'driver':'null-co','size':9223372036854775808}",
        "blockdev-add {'node-name':5,'driver':'file','filename':1,'foo':1}",
        "blockdev-add {'foo':1,'driver':'file'}",
        "blockdev-add {'read-only':1,'discard':'q','driver':'file'}",
        "blockdev-add {'driver':'qcow2','discard':'q','cache':5,'file':5}",
        "nbd-server-start {}",
        "nbd-server-start {'addr':{}}",
        "nbd-server-start {'addr':{'type':'nope'}}",
        "nbd-server-start {'addr':{'type':'unix','path':'x'}}",
        "nbd-server-start {'addr':{'type':'unix','data':{}}}",
        "nbd-server-start {'addr':{'type':'unix','data':1}}",
        "nbd-server-start {'addr':{'type':'unix','data':{'path':'/x','foo':1}}}",
        "nbd-server-start {'addr':{'type':'inet','data':{'host':'x','port':1}}}",
        "nbd-server-start {'addr':{'type':'inet','data':{'host':'x','port':'1','to':65536}}}",
        "nbd-server-start {'addr':{'type':'unix','data':{'path':'/x'}},'max-connections':-1}",
        "nbd-server-start {'addr':{'type':'unix','data':{'path':'/x'}},'max-connections':4294967296}",
        "nbd-server-start {'addr':{'type':'unix','data':{'path':'/x'}},'handshake-max-seconds':4294967296}",
        "block-export-add {}",
        "block-export-add {'type':'nbd'}",
        "block-export-add {'type':'nope','id':'a','node-name':'b'}",
        "block-export-add {'type':'nbd','id':'a','node-name':'b','foo':1}",
        "block-export-add {'type':'nbd','id':'a','node-name':'b','bitmaps':1}",
        "block-export-add {'type':'nbd','id':'a','node-name':'b','bitmaps':[1]}",
        "block-export-add {'type':'nbd','id':'a','node-name':'b','bitmaps':['x',{'node':1}]}",
        "block-export-add {'type':'nbd','id':'a','node-name':'b','bitmaps':[{'node':'a'}]}",
        "block-export-add {'type':'nbd','id':'a','node-name':'b','bitmaps':[{'node':'a','name':'b','c':1}]}",
        "block-export-del {'id':'a','mode':'x'}",
        "block_resize {'size':'x'}",
        "block_resize {}",
        "block_resize {'device':'a','size':1e3}",
        "query-named-block-nodes {'flat':1}",
        "blockdev-snapshot-sync {'mode':'x','snapshot-file':'a'}",
        "blockdev-snapshot-sync {}",
        "job-cancel {'id':5}",
    ];
    let inputs: Vec<_> = commands
        .iter()
        .map(|command| {
            let (name, arguments) = command.split_once(' ').expect("a name and arguments");
            format!("{{'execute':'{name}','arguments':{arguments}}}").into_bytes()
        })
        .collect();
    compare(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

/// Kind, name, and each member's name and whether it may be left out, of the arguments or data of `entry`.
fn outline(schema: &[Value], entry: &Object) -> String {
    let text = |object: &Object, member: &str| object.get(member).and_then(Value::as_str).map(str::to_owned);
    let arguments = text(entry, "arg-type").expect("every command and event has it");
    let named = |entry: &&Object| text(entry, "name").as_ref() == Some(&arguments);
    let arguments = schema.iter().filter_map(Value::as_object).find(named).expect("described");
    let members = arguments.get("members").and_then(Value::as_list).expect("an object has members");
    let mut members: Vec<_> = members
        .iter()
        .filter_map(Value::as_object)
        .map(|member| (text(member, "name"), member.get("default").is_some()))
        .collect();
    members.sort();
    format!("{:?} {:?} {members:?}", text(entry, "meta-type"), text(entry, "name"))
}

fn outlines(schema: &[Value]) -> Vec<String> {
    let entries = schema.iter().filter_map(Value::as_object);
    entries.filter(|entry| entry.get("arg-type").is_some()).map(|entry| outline(schema, entry)).collect()
}

#[test]
fn every_command_and_event_is_one_of_the_reference() {
    let Some(lines) = reference(b"{'execute':'qmp_capabilities'}{'execute':'query-qmp-schema'}") else {
        return;
    };
    let reply = json::parse(lines[1].as_bytes()).expect("JSON");
    let theirs = reply.as_object().and_then(|reply| reply.get("return")?.as_list()).expect("a list");
    let theirs = outlines(theirs);
    let ours = query_qmp_schema(Program::StorageDaemon);
    // Arguments of later versions than the reference.
    let later = [", (Some(\"target-is-zero\"), true)", ", (Some(\"on-cbw-error\"), true)"];
    for outline in outlines(ours.as_list().expect("a list")) {
        let outline = later.iter().fold(outline, |outline, argument| outline.replace(argument, ""));
        assert!(theirs.contains(&outline), "{outline}");
    }
}
