package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"unicode/utf8"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/term"
)

// The shell on a terminal: lines are edited, remembered and completed by
// golang.org/x/term, which needs of the client's terminal what a VT100 has.
//
//	channel ─▶ terminalInput ─▶ term.Terminal ─▶ line ─▶ command
//	              └ ctrl-C: ends the command, or clears the line

// A terminalSize is the size of a client's terminal, of which it may tell at
// any time.
type terminalSize struct {
	mu            sync.Mutex // guards what follows
	width, height int        // in characters; 0 without a terminal
	resized       chan struct{}
}

// maxTerminal bounds the width and height of a terminal.
const maxTerminal = 4096

// granted reads a request for a terminal (RFC 4254, 6.2). Its modes do not
// matter: there is nothing here that would obey them.
func (t *terminalSize) granted(payload []byte) bool {
	var req struct {
		Term                                   string
		Columns, Rows, PixelWidth, PixelHeight uint32
		Modes                                  string
	}
	if gossh.Unmarshal(payload, &req) != nil {
		return false
	}
	t.set(req.Columns, req.Rows)
	return true
}

// changed reads the new size of a terminal (RFC 4254, 6.7).
func (t *terminalSize) changed(payload []byte) bool {
	var req struct{ Columns, Rows, PixelWidth, PixelHeight uint32 }
	if w, _, _ := t.get(); w == 0 || gossh.Unmarshal(payload, &req) != nil {
		return false
	}
	t.set(req.Columns, req.Rows)
	return true
}

// set notes a size; one that cannot be is taken for the usual one.
func (t *terminalSize) set(columns, rows uint32) {
	bound := func(n uint32, usual int) int {
		if n == 0 || n > maxTerminal {
			return usual
		}
		return int(n)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.width, t.height = bound(columns, 80), bound(rows, 24)
	if t.resized == nil {
		t.resized = make(chan struct{}, 1)
	}
	select {
	case t.resized <- struct{}{}:
	default: // told already
	}
}

// get returns the size, and what has something when it was changed.
func (t *terminalSize) get() (width, height int, resized <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.width, t.height, t.resized
}

// isTerminal reports whether the client shows a terminal what it is sent.
func (ss *session) isTerminal() bool {
	w, _, _ := ss.term.get()
	return w > 0
}

// runTerminal is the shell on a terminal. Its exit status is 0, as of any shell
// that was left.
func (ss *session) runTerminal() int {
	in := ss.newTerminalInput()
	defer in.close()
	t := term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{in, ss.ch}, "nbd> ")
	t.AutoCompleteCallback = func(line string, pos int, key rune) (string, int, bool) {
		if key != '\t' {
			return "", 0, false
		}
		return ss.complete(t, line, pos)
	}
	stop := ss.followSize(t)
	defer stop()
	fmt.Fprintf(t, "nbd %s, account %s. `help` lists the commands, ctrl-D leaves.\n", ss.server.cfg.Version, ss.Client.Account.Name)
	for {
		line, err := t.ReadLine()
		if err != nil {
			if errors.Is(err, io.EOF) {
				_, _ = io.WriteString(t, "\n") // the client may be gone
				return 0
			}
			return exitError
		}
		words, err := splitWords(line)
		switch {
		case err != nil:
			ss.shellError(t, usagef("cannot read the line: %v", err))
		case len(words) == 1 && isExit(words[0]):
			return 0
		case len(words) > 0:
			ss.runInterruptible(in, t, words)
		}
		if ss.ctx.Err() != nil {
			return exitError
		}
	}
}

// runInterruptible runs a command that ctrl-C ends; its output goes to a
// terminal.
func (ss *session) runInterruptible(in *terminalInput, out io.Writer, words []string) int {
	ctx, cancel := context.WithCancel(ss.ctx)
	defer cancel()
	in.interrupts(cancel)
	defer in.interrupts(nil)
	return ss.runLine(ctx, nil, out, out, words)
}

// followSize tells t each size of the client's terminal until stop.
func (ss *session) followSize(t *term.Terminal) (stop func()) {
	ctx, cancel := context.WithCancel(ss.ctx)
	var done sync.WaitGroup
	done.Go(func() {
		for {
			width, height, resized := ss.term.get()
			if t.SetSize(width, height) != nil {
				return // the client is gone
			}
			select {
			case <-resized:
			case <-ctx.Done():
				return
			}
		}
	})
	return func() { cancel(); done.Wait() }
}

// maxTyped is how much may be typed ahead, in bytes.
const maxTyped = 4 << 10

// A terminalInput is what is typed at a terminal. It is read all the time, so
// that ctrl-C is seen while a command runs.
type terminalInput struct {
	mu        sync.Mutex // guards what follows
	changed   sync.Cond
	typed     []byte
	partial   []byte // the beginning of a character
	err       error  // of the channel
	interrupt func() // ends the command that runs; nil when none does
}

// newTerminalInput reads the session's channel until it ends.
func (ss *session) newTerminalInput() *terminalInput {
	in := &terminalInput{}
	in.changed.L = &in.mu
	ss.server.work.Go(func() { in.pump(ss.ch) }) // the session itself is counted
	return in
}

// The keys that mean something here.
const (
	ctrlC = 0x03
	ctrlE = 0x05 // to the end of the line
	ctrlU = 0x15 // clear what is before the cursor
)

func (in *terminalInput) pump(from io.Reader) {
	buf := make([]byte, 1024)
	for {
		n, err := from.Read(buf)
		in.mu.Lock()
		for _, b := range buf[:n] {
			in.characterLocked(b)
		}
		if in.err == nil {
			in.err = err
		}
		ended := in.err != nil
		in.changed.Broadcast()
		in.mu.Unlock()
		if ended {
			return
		}
	}
}

// characterLocked takes one byte of a character. What is none is lost: x/term
// would stop at it until something more is typed.
func (in *terminalInput) characterLocked(b byte) {
	in.partial = append(in.partial, b)
	if !utf8.FullRune(in.partial) {
		return
	}
	if r, _ := utf8.DecodeRune(in.partial); r != utf8.RuneError {
		for _, b := range in.partial {
			in.putLocked(b)
		}
	}
	in.partial = in.partial[:0]
}

// putLocked takes one byte. While a command runs, what is more than may be
// typed ahead is lost; else it waits.
func (in *terminalInput) putLocked(b byte) {
	if b == ctrlC && in.interrupt != nil {
		in.typed = in.typed[:0]
		in.interrupt()
		return
	}
	for len(in.typed) >= maxTyped && in.interrupt == nil && in.err == nil {
		in.changed.Broadcast()
		in.changed.Wait()
	}
	switch {
	case len(in.typed) >= maxTyped:
	case b == ctrlC:
		in.typed = append(in.typed, ctrlE, ctrlU)
	default:
		in.typed = append(in.typed, b)
	}
}

// interrupts says what ctrl-C does from now on; nil for clearing the line.
func (in *terminalInput) interrupts(f func()) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.interrupt = f
	in.changed.Broadcast()
}

// close says that nobody reads any more.
func (in *terminalInput) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.err = io.EOF
	in.changed.Broadcast()
}

// errLongKey ends a terminal that sends a key's sequence without end.
var errLongKey = errors.New("the sequence of a key has no end")

// Read implements io.Reader.
func (in *terminalInput) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, errLongKey // x/term has no room for more of it, and would go on asking
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	for len(in.typed) == 0 && in.err == nil {
		in.changed.Wait()
	}
	if len(in.typed) == 0 {
		return 0, in.err
	}
	n := copy(p, in.typed)
	in.typed = append(in.typed[:0], in.typed[n:]...)
	in.changed.Broadcast()
	return n, nil
}
