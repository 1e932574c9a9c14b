//! A terminal at standard input, for the human monitor: it hands over each key as it is pressed and shows none by
//! itself, as the monitor shows what is typed. The terminal is given back as it was.

use std::io::stdin;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};

/// How it was.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Takes the terminal, if there is one. With `signals` its keys still interrupt (Ctrl-C) and suspend.
pub fn take(signals: bool) {
    let Ok(before) = tcgetattr(stdin()) else { return };
    let mut modes = before.clone();
    modes.input_modes -= InputModes::ICRNL
        | InputModes::INLCR
        | InputModes::IGNCR
        | InputModes::ISTRIP
        | InputModes::IXON
        | InputModes::PARMRK
        | InputModes::BRKINT
        | InputModes::IGNBRK;
    modes.output_modes |= OutputModes::OPOST;
    modes.local_modes -= LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::IEXTEN;
    if !signals {
        modes.local_modes -= LocalModes::ISIG;
    }
    modes.special_codes[SpecialCodeIndex::VMIN] = 1;
    modes.special_codes[SpecialCodeIndex::VTIME] = 0;
    if tcsetattr(stdin(), OptionalActions::Now, &modes).is_ok() {
        BEFORE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(before);
    }
}

/// Gives the terminal back, if it was taken.
pub fn give_back() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // It may have gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}
