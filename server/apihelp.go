package server

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// helpCommands are those about commands.
func helpCommands() []apiCommand {
	return []apiCommand{
		{name: "help", args: "[COMMAND…]", run: runHelp, text: textOf(printHelp), complete: completeHelp,
			help: "list the commands, or say what one does"},
		{name: "exit", run: func(context.Context, *apiCall) (any, error) { return struct{}{}, nil },
			text: func(io.Writer, any) error { return nil }, help: "leave the shell"},
	}
}

// An apiHelp is what help tells of one command.
type apiHelp struct {
	Name       string        `json:"name"`
	Usage      string        `json:"usage"`
	Help       string        `json:"help"`
	More       string        `json:"more,omitempty"`
	Permission Permission    `json:"permission,omitempty"`
	Options    []apiHelpFlag `json:"options,omitempty"`
}

// An apiHelpFlag is what help tells of an option.
type apiHelpFlag struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
	Help  string `json:"help"`
}

// runHelp answers with the commands whose names begin with the arguments.
func runHelp(_ context.Context, c *apiCall) (any, error) {
	list := []apiHelp{}
	prefix := strings.Join(c.args, " ")
	for _, cmd := range apiCommands() {
		if prefix != "" && cmd.name != prefix && !strings.HasPrefix(cmd.name, prefix+" ") {
			continue
		}
		h := apiHelp{Name: cmd.name, Usage: cmd.usage(), Help: cmd.help, More: cmd.more, Permission: cmd.need}
		for _, f := range cmd.flags {
			h.Options = append(h.Options, apiHelpFlag{f.name, f.value, f.help})
		}
		list = append(list, h)
	}
	if len(list) == 0 {
		return nil, usagef("there is no command %q; `help` lists all", clip(prefix))
	}
	return list, nil
}

// printHelp writes a line for each of several commands, and all about one.
func printHelp(w io.Writer, list []apiHelp) error {
	var text strings.Builder
	if len(list) > 1 {
		for _, h := range list {
			short := commandNamed(h.Name)
			fmt.Fprintf(&text, "  %-34s %s\n", strings.TrimSpace(h.Name+" "+short.args), h.Help)
		}
		text.WriteString("\n`help COMMAND` says more. `ssh HOST api COMMAND` answers in JSON.\n")
	} else {
		h := list[0]
		fmt.Fprintf(&text, "usage: %s\n\n%s\n", h.Usage, upperFirst(h.Help))
		for _, f := range h.Options {
			fmt.Fprintf(&text, "  %-26s %s\n", strings.TrimSpace(f.Name+" "+f.Value), f.Help)
		}
		if h.More != "" {
			fmt.Fprintf(&text, "%s\n", h.More)
		}
		if h.Permission != "" {
			fmt.Fprintf(&text, "It needs the permission %s.\n", h.Permission)
		}
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// upperFirst makes a sentence.
func upperFirst(s string) string { return strings.ToUpper(s[:1]) + s[1:] + "." }

// completeHelp completes the name of a command.
func completeHelp(_ context.Context, _ *apiCall, args []string) (words []string) {
	done := strings.Join(args[:len(args)-1], " ")
	for _, cmd := range apiCommands() {
		rest := strings.TrimSpace(strings.TrimPrefix(cmd.name, done))
		if done != "" && !strings.HasPrefix(cmd.name, done+" ") || rest == "" {
			continue
		}
		first, _, _ := strings.Cut(rest, " ")
		words = append(words, first)
	}
	return slices.Compact(words)
}
