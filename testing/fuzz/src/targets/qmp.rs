//! A monitor's input: how the bytes are cut into pieces must make no difference, and what is sent back must be JSON
//! that means the same when it is read.

use underlay_qmp::json;
use underlay_qmp::session::{Incoming, Session, reply};

/// Feeds a session with the bytes, at once and in pieces.
pub fn run(data: &[u8]) {
    let mut session = Session::default();
    let whole = session.push(data);
    let mut session = Session::default();
    let size = 1 + data.first().map_or(0, |&byte| usize::from(byte % 64));
    let pieces: Vec<Incoming> = data.chunks(size).flat_map(|piece| session.push(piece)).collect();
    assert_eq!(
        format!("{whole:?}"),
        format!("{pieces:?}"),
        "pieces of {size} bytes are understood differently"
    );
    for incoming in whole {
        let answer = match incoming {
            Incoming::Reply(answer) | Incoming::Urgent(answer) => answer,
            Incoming::Request(request) => reply(request.arguments.into(), request.id),
        };
        let printed = answer.to_string();
        if printed.contains("inf") {
            // A number that is too large comes back like this, from the reference too.
            continue;
        }
        let again = json::parse(printed.as_bytes()).map(|value| value.to_string());
        assert_eq!(again, Ok(printed), "what is printed must be JSON that prints the same");
    }
    let _ = json::parse(data);
}

/// Conversations that are fine, and some that are not.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"query-status\", \"id\": 7}\n",
        "{'execute':'qmp_capabilities','arguments':{'enable':[]},'id':{'a':[1,2.5,null,true,'\\u20ac\\ud83d\\ude00']}}",
        "{\"execute\":\"qmp_capabilities\"}{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"qcow2\",\
         \"node-name\":\"a\",\"file\":{\"driver\":\"file\",\"filename\":\"a\"}}}",
        "{\"execute\":\"qmp_capabilities\"}{\"execute\":\"block-commit\",\"arguments\":{\"device\":\"d\",\
         \"speed\":-9223372036854775808,\"job-id\":\"j\"},\"id\":18446744073709551615}",
        "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}{'exec-oob':'quit','id':1}{'exec-oob':1,'execute':'x'}",
        "{'execute':'qmp_capabilities'}{'execute':'chardev-add','arguments':{'id':'c','backend':{'type':'socket','data':\
         {'addr':{'type':'inet','data':{'host':'','port':'0','to':9}},'wait':false,'reconnect':-1,'logfile':''}}}}",
        "{'execute':'qmp_capabilities'}{'execute':'x-blockdev-amend','arguments':{'job-id':'j','node-name':'n','options':\
         {'driver':'qcow2','encrypt':{'format':'luks','state':'active','keyslot':1}},'force':true}}",
        "{\"exec-oob\": \"qmp_capabilities\"} [] 1 \"\" null ] } { \u{ff} {\"execute\": 1e400}",
        "[[[[[[[[[[{\"a\":[{\"b\":[{}]}]}]]]]]]]]]]\r\n\t{}",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
