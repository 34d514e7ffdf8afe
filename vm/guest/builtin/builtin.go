// Package builtin holds the builders that Nix has inside itself: a derivation
// asks for one with a builder such as "builtin:fetchurl". They run where a
// builder's program would, in the sandbox, as the build user, with nothing but
// what an Order says.
//
//   - buildenv makes the tree of symlinks that a user environment is.
//   - fetchurl downloads one file, and may unpack a Nix archive or make the file
//     executable. It needs a network and certificates; nothing of the server's
//     environment, proxies or passwords reaches it.
//   - unpack-channel unpacks an archive that holds one file or folder, and gives
//     that a name.
//
// What they make and what they say is what Nix 2.34 makes and says, colours
// included (src/libstore/builtins in its sources, and builds by it): warnings are
// messages in JSON, which the client takes out of the log, and an error is the
// last line of the log. They read derivations' attributes as they are, so that
// structured attributes are not seen, as in Nix.
//
// What Nix's can do and these cannot is in vm/SANDBOX.md.
package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"nbd/vm/link"
)

// An Order says what to do. Strings may hold any bytes; JSON would mend what is
// not UTF-8, so they travel as bytes.
type Order struct {
	// Builder is the derivation's, with link.BuiltinPrefix.
	Builder string
	// Attrs are the derivation's attributes, each "NAME=value".
	Attrs [][]byte
	// Outputs are the paths of the outputs by name.
	Outputs map[string]string
	// Fixed says that the output's content is known beforehand.
	Fixed bool
}

// attr returns an attribute that must be there.
func (o *Order) attr(name string) (string, error) {
	value, ok := o.lookup(name)
	if !ok {
		return "", errorf("attribute '%s' missing", name)
	}
	return value, nil
}

// lookup returns an attribute.
func (o *Order) lookup(name string) (value string, ok bool) {
	for _, a := range o.Attrs {
		if n, v, _ := strings.Cut(string(a), "="); n == name {
			return v, true
		}
	}
	return "", false
}

// out returns the path of the output that every builtin builder makes.
func (o *Order) out() (string, error) {
	out, ok := o.Outputs["out"]
	if !ok {
		return "", errorf("'%s' requires an 'out' output", o.Builder)
	}
	return out, nil
}

// Run does what an order says, and returns the exit status of the builder: 1 if
// it failed, which log tells. CACertificates is a PEM file, which may be missing.
func Run(ctx context.Context, o *Order, log io.Writer) (status int) {
	if err := run(ctx, o, &logger{log}); err != nil {
		// There is nobody else to tell if this fails.
		io.WriteString(log, report(err))
		return 1
	}
	return 0
}

func run(ctx context.Context, o *Order, log *logger) error {
	switch name := strings.TrimPrefix(o.Builder, link.BuiltinPrefix); name {
	case "buildenv":
		return buildEnvironment(o, log)
	case "fetchurl":
		return fetchURL(ctx, o, log)
	case "unpack-channel":
		return unpackChannel(o, log)
	default:
		return errorf("unsupported builtin builder '%s'", name)
	}
}

// Colours that Nix prints.
const (
	red     = "\x1b[31;1m"
	magenta = "\x1b[35;1m"
	plain   = "\x1b[0m"
)

// errorf returns an error with its arguments coloured.
func errorf(format string, args ...any) error {
	for i, a := range args {
		args[i] = magenta + fmt.Sprint(a) + plain
	}
	return fmt.Errorf(format, args...)
}

// report is what Nix prints of an error: all lines but the first are indented.
func report(err error) string {
	lines := strings.Split(err.Error(), "\n")
	for i, line := range lines[1:] {
		if line != "" {
			lines[i+1] = "       " + line
		}
	}
	if lines[0] != "" {
		lines[0] = " " + lines[0]
	}
	return red + "error:" + plain + strings.Join(lines, "\n") + "\n"
}

// A logger writes the messages that are no errors.
type logger struct{ w io.Writer }

// warn writes a warning as Nix's processes tell one another of it.
func (l *logger) warn(format string, args ...any) error {
	e := json.NewEncoder(l.w)
	e.SetEscapeHTML(false)
	if _, err := io.WriteString(l.w, "@nix "); err != nil {
		return fmt.Errorf("write log: %w", err)
	}
	return e.Encode(map[string]any{
		"action": "msg", "level": 1,
		"msg": magenta + "warning:" + plain + " " + fmt.Sprintf(format, args...),
	})
}

// quoted is how Nix prints a path that it quotes itself.
func quoted(path string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(path) + `"`
}

// reason returns the C library's words for what an operating system's error
// wraps, without paths.
func reason(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	text := errno.Error()
	return strings.ToUpper(text[:1]) + text[1:]
}

// fields splits a list of words as Nix does.
func fields(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(" \t\n\r", r) })
}
