package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
)

// The commands of an account: one table, apiCommands, for all ways in. `ssh
// host shell` renders what a command answers as text (shell.go, terminal.go),
// `ssh host api` as JSON (apijson.go).
//
//	line ─▶ words ─▶ apiCommand ─▶ flags, arguments ─▶ permission ─▶ run ─▶ value
//	        command.go   └────────── this file ──────────┘             │
//	                              text or JSON, bounded and streamed ◀─┘
//
// A command acts in the account of its session and sees nothing else: what
// belongs to others is answered as what does not exist.

// An apiCommand is one row of the table of commands.
type apiCommand struct {
	name  string // its words: "builds list"
	args  string // what follows, for people: "ID"; "[…]" where it may be missing
	flags []apiFlag
	help  string // one line
	more  string // further lines of help
	// need is the permission without which it is refused, "" for none.
	need Permission
	// run does it. The value that it returns is JSON-ready, or an apiSeq of such
	// values, or an io.ReadCloser of bytes that are passed on as they are, or an
	// *attached.
	run func(ctx context.Context, c *apiCall) (any, error)
	// text renders a value of run for people. A command whose value is a stream
	// of bytes needs none.
	text func(w io.Writer, v any) error
	// complete returns what the last of args, which is being typed, may become.
	complete func(ctx context.Context, c *apiCall, args []string) []string
}

// An apiFlag is an option of a command.
type apiFlag struct {
	name  string // with its dashes
	value string // what it takes, for people; "" if it takes nothing
	help  string
}

// An apiCall is a command with its arguments, by somebody.
type apiCall struct {
	*Session
	server *Server
	args   []string
	flags  map[string][]string // values by name, in order; one "" for a flag without
	callMode
}

// readInput reads a text from the client.
func (c *apiCall) readInput() (string, error) {
	if c.input == nil {
		return "", usagef("standard input is read by a single command only: ssh HOST shell COMMAND")
	}
	b, err := io.ReadAll(io.LimitReader(c.input, maxSignature+1))
	return string(b), err
}

// flag returns the last value of a flag, and whether it was given.
func (c *apiCall) flag(name string) (string, bool) {
	v := c.flags[name]
	if len(v) == 0 {
		return "", false
	}
	return v[len(v)-1], true
}

// has reports whether a flag was given.
func (c *apiCall) has(name string) bool { return len(c.flags[name]) > 0 }

// A usageError is a command line that cannot be understood.
type usageError struct{ msg string }

func (e *usageError) Error() string { return e.msg }

// A notFoundError says that something is not there, or not the account's.
type notFoundError struct{ msg string }

func (e *notFoundError) Error() string { return e.msg }

func notFoundf(format string, args ...any) error {
	return &notFoundError{fmt.Sprintf(format, args...)}
}

func usagef(format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...)}
}

// apiErrorText is what the client of a session is told of an error.
func apiErrorText(s *Session, err error) string {
	var usage *usageError
	var missing *notFoundError
	if errors.As(err, &usage) || errors.As(err, &missing) {
		return err.Error()
	}
	text, level := explain(s, err)
	s.Log.Log(context.Background(), level, "command failed", "err", err)
	return text
}

// exitUsage is the exit status of a command line that cannot be understood.
const exitUsage = 2

// apiStatus is the exit status for an error of a command.
func apiStatus(err error) int {
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		return exitUsage
	}
	return exitError
}

// apiAliases are commands by other words.
var apiAliases = map[string]string{
	"builds":       "builds list",
	"ssh-keys":     "ssh-keys list",
	"signing-keys": "signing-keys list",
	"tokens":       "tokens list",
	"store":        "store info",
	"quit":         "exit",
	"?":            "help",
}

// findCommand returns the command that words begin with, and the rest of them.
func findCommand(words []string) (*apiCommand, []string, error) {
	for n := min(len(words), 2); n > 0; n-- {
		name := strings.Join(words[:n], " ")
		if cmd := commandNamed(name); cmd != nil {
			return cmd, words[n:], nil
		}
	}
	name := words[0]
	if full, ok := apiAliases[name]; ok {
		if len(words) > 1 && !strings.HasPrefix(words[1], "-") && isGroup(name) {
			return nil, nil, usagef("there is no command %q; `help %s` lists what there is", clip(name+" "+words[1]), name)
		}
		return commandNamed(full), words[1:], nil
	}
	if isGroup(name) {
		return nil, nil, usagef("%s is not complete; `help %s` lists what may follow", name, name)
	}
	return nil, nil, usagef("there is no command %q; `help` lists all", clip(name))
}

// commandNamed returns the command of that name, nil if there is none.
func commandNamed(name string) *apiCommand {
	i := slices.IndexFunc(apiCommands(), func(c apiCommand) bool { return c.name == name })
	if i < 0 {
		return nil
	}
	return &apiCommands()[i]
}

// isGroup reports whether commands of two words begin with name.
func isGroup(name string) bool {
	return slices.ContainsFunc(apiCommands(), func(c apiCommand) bool { return strings.HasPrefix(c.name, name+" ") })
}

// parseCall understands the words of a command line.
func parseCall(words []string) (*apiCommand, *apiCall, error) {
	cmd, rest, err := findCommand(words)
	if err != nil {
		return nil, nil, err
	}
	c := &apiCall{flags: map[string][]string{}}
	for len(rest) > 0 {
		word := rest[0]
		rest = rest[1:]
		if !strings.HasPrefix(word, "--") || len(word) == 2 {
			c.args = append(c.args, word)
			continue
		}
		name, value, hasValue := strings.Cut(word, "=")
		name = strings.ReplaceAll(name, "_", "-")
		f := cmd.flag(name)
		switch {
		case f == nil:
			return nil, nil, usagef("%s has no option %s; `help %s` lists those it has", cmd.name, clip(name), cmd.name)
		case f.value == "" && hasValue:
			return nil, nil, usagef("option %s takes no value", name)
		case f.value != "" && !hasValue:
			if len(rest) == 0 {
				return nil, nil, usagef("option %s needs a value: %s", name, f.value)
			}
			value, rest = rest[0], rest[1:]
		}
		c.flags[name] = append(c.flags[name], value)
	}
	if least, most := cmd.arity(); len(c.args) < least || len(c.args) > most {
		return nil, nil, usagef("usage: %s", cmd.usage())
	}
	return cmd, c, nil
}

// helpFlag is an option of every command.
var helpFlag = apiFlag{name: "--help", help: "say what the command does"}

// flag returns an option by its name, nil if the command has no such option.
func (cmd *apiCommand) flag(name string) *apiFlag {
	if name == helpFlag.name {
		return &helpFlag
	}
	i := slices.IndexFunc(cmd.flags, func(f apiFlag) bool { return f.name == name })
	if i < 0 {
		return nil
	}
	return &cmd.flags[i]
}

// arity returns how many arguments the command takes.
func (cmd *apiCommand) arity() (least, most int) {
	for word := range strings.FieldsSeq(cmd.args) {
		most++
		if !strings.HasPrefix(word, "[") {
			least++
		}
		if strings.HasSuffix(word, "…]") || strings.HasSuffix(word, "…") {
			most = maxArgs
		}
	}
	return least, most
}

// maxArgs bounds how many arguments a command takes.
const maxArgs = 1000

// usage is the command with what it takes, in one line.
func (cmd *apiCommand) usage() string {
	text := cmd.name
	if cmd.args != "" {
		text += " " + cmd.args
	}
	for _, f := range cmd.flags {
		text += " [" + strings.TrimSpace(f.name+" "+f.value) + "]"
	}
	return text
}

// A callMode says how a command came: what of an apiCall is not in its words.
type callMode struct {
	// text says that the answer is for people.
	text bool
	// input is what the client sends to a single command; nil where there is no
	// such thing.
	input io.Reader
}

// call runs the command that words name, in session s.
func (s *Server) call(ctx context.Context, sess *Session, words []string, mode callMode) (*apiCommand, any, error) {
	cmd, c, err := parseCall(words)
	if err != nil {
		return nil, nil, err
	}
	if c.has(helpFlag.name) {
		c = &apiCall{args: strings.Fields(cmd.name)}
		cmd = commandNamed("help")
	}
	c.Session, c.server, c.callMode = sess, s, mode
	if cmd.need != "" {
		if err := sess.Client.require(cmd.need); err != nil {
			return nil, nil, err
		}
	}
	v, err := cmd.run(ctx, c)
	return cmd, v, err
}

// An apiSeq is a list for an answer. It is read page by page while it is
// written, so that it takes no memory, and a slow client holds nothing of the
// store. It ends with the first error.
type apiSeq[T any] func(yield func(T, error) bool)

// A valueSeq is an apiSeq of values of any type.
type valueSeq interface {
	each(f func(v any) error) error
}

// each calls f with the values; it returns the first error of either.
func (s apiSeq[T]) each(f func(v any) error) error {
	for v, err := range s {
		if err != nil {
			return err
		}
		if err := f(v); err != nil {
			return err
		}
	}
	return nil
}

// listText makes a text function of one that writes a row; head is the first
// line, "" for none, and empty what is written if there are no rows.
func listText[T any](head, empty string, row func(w io.Writer, v T) error) func(io.Writer, any) error {
	return func(w io.Writer, v any) error {
		n := 0
		for item, err := range v.(apiSeq[T]) {
			if err != nil {
				return err
			}
			if n == 0 && head != "" {
				if _, err := io.WriteString(w, head+"\n"); err != nil {
					return err
				}
			}
			n++
			if err := row(w, item); err != nil {
				return err
			}
		}
		if n == 0 {
			_, err := io.WriteString(w, empty+"\n")
			return err
		}
		return nil
	}
}

// seqOf is the sequence of a list that is known.
func seqOf[T any](list []T) apiSeq[T] {
	return func(yield func(T, error) bool) {
		for _, v := range list {
			if !yield(v, nil) {
				return
			}
		}
	}
}

// textOf makes a text function of one that knows its value's type.
func textOf[T any](f func(w io.Writer, v T) error) func(io.Writer, any) error {
	return func(w io.Writer, v any) error { return f(w, v.(T)) }
}

// commandTable is the table of all commands. It is made when it is first used:
// help, which is in it, reads it.
var commandTable struct {
	once sync.Once
	list []apiCommand
}

// apiCommands returns the table of all commands, in the order of help.
func apiCommands() []apiCommand {
	commandTable.once.Do(func() {
		commandTable.list = slices.Concat(
			buildCommands(),
			controlCommands(),
			summaryCommands(),
			settingsCommands(),
			keyCommands(),
			tokenCommands(),
			storeCommands(),
			helpCommands(),
		)
	})
	return commandTable.list
}
