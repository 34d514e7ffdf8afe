package server

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// A protocol is what an exec command asks to be spoken on its channel.
type protocol uint8

const (
	workerProtocol protocol = iota + 1 // nix-daemon --stdio
	serveProtocol                      // nix-store --serve
	shellProtocol                      // shell, or no command
	apiProtocol                        // api
)

// String names the protocol: the scheme of a store address, or the command.
func (p protocol) String() string {
	switch p {
	case serveProtocol:
		return "ssh"
	case shellProtocol:
		return "shell"
	case apiProtocol:
		return "api"
	}
	return "ssh-ng"
}

// A command is an exec command that is served.
type command struct {
	protocol protocol
	write    bool     // the serve protocol was asked for with --write
	words    []string // what follows shell or api
}

// Exit statuses of refused commands: as a shell has them.
const (
	exitError     = 1
	exitNoCommand = 127
)

// A refusedCommand says in one line why an exec command is not served.
type refusedCommand struct {
	status int // exit status of the channel
	msg    string
}

func (e *refusedCommand) Error() string { return e.msg }

// maxCommandLen is the longest exec command that is looked at, in bytes.
const maxCommandLen = 8 << 10

// parseCommand understands the exec commands that are served: those that Nix
// clients send, shell and api. No command is the shell. Its error is a
// *refusedCommand.
func parseCommand(s string) (command, error) {
	words, err := splitWords(s)
	if err != nil {
		return command{}, &refusedCommand{exitError, fmt.Sprintf("cannot read the command: %v", err)}
	}
	if len(words) == 0 {
		return command{protocol: shellProtocol}, nil
	}
	switch words[0] {
	case "shell":
		return command{protocol: shellProtocol, words: words[1:]}, nil
	case "api":
		return command{protocol: apiProtocol, words: words[1:]}, nil
	}
	switch name := path.Base(words[0]); name {
	case "nix-daemon":
		return parseOptions(command{protocol: workerProtocol}, name, "--stdio", words[1:])
	case "nix-store":
		return parseOptions(command{protocol: serveProtocol}, name, "--serve", words[1:])
	default:
		return command{}, &refusedCommand{exitNoCommand, fmt.Sprintf("command %q is not available here; this server serves Nix clients (nix-daemon --stdio, nix-store --serve --write), shell and api", clip(name))}
	}
}

// parseOptions reads the options of either program; mode is the one it must
// have.
func parseOptions(cmd command, name, mode string, args []string) (command, error) {
	hasMode := false
	for i := 0; i < len(args); i++ {
		switch arg := args[i]; {
		case arg == mode:
			hasMode = true
		case arg == "--write" && cmd.protocol == serveProtocol:
			cmd.write = true
		case arg == "--store" && i+1 < len(args) && ownStore(args[i+1]):
			i++
		default:
			return command{}, &refusedCommand{exitError, fmt.Sprintf("%s: option %q is not supported by this server", name, clip(arg))}
		}
	}
	if !hasMode {
		return command{}, &refusedCommand{exitError, fmt.Sprintf("%s: only %s %s is served here", name, name, mode)}
	}
	return cmd, nil
}

// ownStore reports whether a store address means the remote side's own store,
// which is the only one there is.
func ownStore(addr string) bool {
	return addr == "auto" || addr == "daemon" || addr == "local"
}

// splitWords splits a command into words by the quoting rules of the POSIX
// shell and nothing more: what else is special to a shell stands for itself.
func splitWords(s string) ([]string, error) {
	if len(s) > maxCommandLen {
		return nil, fmt.Errorf("longer than %d bytes", maxCommandLen)
	}
	var words []string
	var word strings.Builder
	inWord := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == ' ' || c == '\t' || c == '\n':
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
			continue
		case c == '\'':
			n := strings.IndexByte(s[i+1:], '\'')
			if n < 0 {
				return nil, errors.New("quote without end")
			}
			word.WriteString(s[i+1 : i+1+n])
			i += 1 + n
		case c == '"':
			n, err := doubleQuoted(s[i+1:], &word)
			if err != nil {
				return nil, err
			}
			i += n
		case c == '\\':
			if i++; i == len(s) {
				return nil, errors.New("backslash at the end")
			}
			word.WriteByte(s[i])
		default:
			word.WriteByte(c)
		}
		inWord = true
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}

// doubleQuoted copies what is between double quotes, the opening one being
// read already, and returns how many bytes of s it took.
func doubleQuoted(s string, word *strings.Builder) (int, error) {
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '"':
			return i + 1, nil
		case '\\':
			if i+1 < len(s) && strings.IndexByte("$`\"\\", s[i+1]) >= 0 {
				i++
				c = s[i]
			}
			word.WriteByte(c)
		default:
			word.WriteByte(c)
		}
	}
	return 0, errors.New("quote without end")
}

// clip keeps a client's text out of messages: at most 80 bytes of it.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
