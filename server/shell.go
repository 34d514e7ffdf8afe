package server

import (
	"bufio"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"time"
)

// runAPI runs one command and answers in JSON; it returns the exit status.
// What is written to stdout is the answer and nothing else.
func (ss *session) runAPI(words []string) int {
	fail := func(err error) int {
		ss.writeFailure(apiErrorText(ss.Session, err))
		return apiStatus(err)
	}
	if len(words) == 0 {
		return fail(usagef("api needs a command; `api help` lists all"))
	}
	if !ss.begin() {
		return fail(errEnding)
	}
	defer ss.finish()
	ctx, stop := ss.untilInterrupted()
	defer stop()
	_, v, err := ss.server.call(ctx, ss.Session, words, callMode{input: ss.input()})
	if err == nil {
		err = writeAnswer(ss.stdout(), v)
	}
	if err != nil {
		return fail(err)
	}
	return 0
}

// writeFailure writes an error as JSON.
func (ss *session) writeFailure(text string) {
	if b, err := apiJSON(apiFailure{text}); err == nil { // text always is JSON
		_, _ = ss.stderr().Write(append(b, '\n')) // the client may be gone
	}
}

// runShell runs one command, or those that the client sends, one a line; it
// returns the exit status: that of the last command that failed.
func (ss *session) runShell(words []string) int {
	switch {
	case len(words) > 0:
		ctx, stop := ss.untilInterrupted()
		defer stop()
		return ss.runLine(ctx, ss.input(), ss.stdout(), ss.stderr(), words)
	case ss.isTerminal():
		return ss.runTerminal()
	}
	return ss.runLines()
}

// untilInterrupted returns the session's context, which ctrl-C ends, too, if
// there is a terminal.
func (ss *session) untilInterrupted() (ctx context.Context, stop context.CancelFunc) {
	ctx, stop = context.WithCancel(ss.ctx)
	if ss.isTerminal() {
		ss.newTerminalInput().interrupts(stop)
	}
	return ctx, stop
}

// runLines is the shell on plain pipes.
func (ss *session) runLines() int {
	in := bufio.NewReaderSize(ss.ch, maxCommandLen+1)
	status := 0
	open := false // the last line of stdout has no end yet
	for {
		words, err := readWords(in)
		var usage *usageError
		switch {
		case errors.As(err, &usage):
			status = ss.shellError(ss.stderr(), usage)
		case len(words) == 1 && isExit(words[0]):
			return status
		case len(words) > 0:
			if open {
				_, _ = io.WriteString(ss.stdout(), "\n") // the client may be gone
			}
			var st int
			if isOldKeyCommand(words) && !errors.Is(err, errLastLine) {
				st, open = ss.runOldKeyCommand(in, words)
			} else {
				st, open = ss.runLine(ss.ctx, nil, ss.stdout(), ss.stderr(), words), false
			}
			if st != 0 {
				status = st
			}
		}
		if errors.Is(err, errLastLine) {
			return status
		}
	}
}

// isOldKeyCommand reports whether the oldest published scripts ask so for the
// signing key of their account.
func isOldKeyCommand(words []string) bool {
	return slices.Equal(words, []string{"show", "public-signing-key"})
}

// oldKeyWait is how long a client may send nothing before it is taken for one of
// those scripts.
const oldKeyWait = time.Second

// runOldKeyCommand answers those scripts as they want it. They send nothing more
// until the key comes on stderr, behind a prompt with the name of the server;
// they cut the prompt off, and take that together with what is on stdout for a
// list of keys. So the line on stdout is left open for them, and there is one
// blank more behind the prompt. Who sends on, or is done, is answered as always.
func (ss *session) runOldKeyCommand(in *bufio.Reader, words []string) (status int, open bool) {
	more := make(chan struct{})
	go func() {
		defer close(more)
		_, _ = in.Peek(1) // its error comes again
	}()
	var answer strings.Builder
	status = ss.runLine(ss.ctx, nil, &answer, ss.stderr(), words)
	timer := time.NewTimer(oldKeyWait)
	defer timer.Stop()
	// The client may be gone: errors of writing are of no use.
	select {
	case <-more:
		_, _ = io.WriteString(ss.stdout(), answer.String())
		return status, false
	case <-timer.C:
	}
	key := strings.TrimSpace(answer.String())
	server, _, _ := strings.Cut(key, "/")
	_, _ = io.WriteString(ss.stdout(), key)
	_, _ = io.WriteString(ss.stderr(), server+">  "+key+"\n")
	<-more
	return status, true
}

// isExit reports whether a word ends the shell.
func isExit(word string) bool {
	return word == "exit" || word == "quit" || word == "logout"
}

// errLastLine says that there are no more lines, or that the client is gone.
var errLastLine = errors.New("no more lines")

// readWords reads the words of one line. A line that cannot be read is a
// *usageError; one that is too long is passed over. With the last line there
// is errLastLine.
func readWords(in *bufio.Reader) (words []string, err error) {
	line, err := in.ReadSlice('\n')
	long := false
	for errors.Is(err, bufio.ErrBufferFull) {
		long = true
		_, err = in.ReadSlice('\n')
	}
	if err != nil {
		err = errLastLine
	}
	if long {
		return nil, errors.Join(usagef("a line is longer than %d bytes", maxCommandLen), err)
	}
	words, lineErr := splitWords(strings.TrimRight(string(line), "\r\n"))
	if lineErr != nil {
		lineErr = usagef("cannot read the line: %v", lineErr)
	}
	return words, errors.Join(lineErr, err)
}

// runLine runs one command of the shell and returns its exit status.
func (ss *session) runLine(ctx context.Context, in io.Reader, stdout, stderr io.Writer, words []string) int {
	if !ss.begin() {
		return ss.shellError(stderr, errEnding)
	}
	defer ss.finish()
	cmd, v, err := ss.server.call(ctx, ss.Session, words, callMode{text: true, input: in})
	if err == nil {
		err = ss.print(stdout, cmd, v)
	}
	switch {
	case err != nil && ctx.Err() != nil && ss.ctx.Err() == nil:
		_, _ = io.WriteString(stderr, "\n") // the client may be gone
		return exitInterrupted
	case err != nil:
		return ss.shellError(stderr, err)
	}
	return 0
}

// exitInterrupted is the exit status of a command that ctrl-C ended.
const exitInterrupted = 130

// print writes the value of a command as text.
func (ss *session) print(w io.Writer, cmd *apiCommand, v any) error {
	switch value := v.(type) {
	case io.ReadCloser:
		return ss.printBytes(w, value)
	case *attached:
		if err := ss.printBytes(w, value.log); err != nil {
			return err
		}
		b, err := value.end()
		if err != nil {
			return err
		}
		v = b
	}
	clean := newCleanWriter(w, false)
	out := bufio.NewWriterSize(clean, arrayChunk)
	err := cmd.text(out, v)
	return errors.Join(err, out.Flush(), clean.Close())
}

// printBytes copies bytes; on a terminal only their colours are left of what
// could control it.
func (ss *session) printBytes(w io.Writer, from io.ReadCloser) error {
	defer from.Close()
	if !ss.isTerminal() {
		_, err := io.Copy(w, from)
		return err
	}
	clean := newCleanWriter(w, true)
	_, err := io.Copy(clean, from)
	return errors.Join(err, clean.Close())
}

// shellError writes one error and returns the exit status.
func (ss *session) shellError(stderr io.Writer, err error) int {
	text := strings.ReplaceAll(apiErrorText(ss.Session, err), "\n", " ")
	// The client may be gone.
	_, _ = io.WriteString(newCleanWriter(stderr, false), "nbd: error: "+text+"\n")
	return apiStatus(err)
}

// input is what a single command may read; on a terminal only ctrl-C is read.
func (ss *session) input() io.Reader {
	if ss.isTerminal() {
		return nil
	}
	return ss.ch
}

// stdout is where answers go. On a terminal lines end as terminals need it.
func (ss *session) stdout() io.Writer {
	if ss.isTerminal() {
		return crlfWriter{ss.ch}
	}
	return ss.ch
}

// stderr is where errors go.
func (ss *session) stderr() io.Writer {
	if ss.isTerminal() {
		return crlfWriter{ss.ch.Stderr()}
	}
	return ss.ch.Stderr()
}
