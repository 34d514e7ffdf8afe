// Package admincli is `nbd admin` as commands: what an operator types, and how
// the server's answers are printed. Each group of commands has a file. The
// package asks a running server by package adminapi and knows nothing else of
// it.
package admincli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"nbd/server/adminapi"
)

// Command returns `nbd admin`, with the flags --state, which is state unless it
// is given, and --json for all commands below it.
func Command(state string) *cobra.Command {
	f := &flags{}
	cmd := &cobra.Command{Use: "admin", Short: "Rule a running server, on its machine", RunE: NeedsCommand}
	cmd.PersistentFlags().StringVar(&f.state, "state", state, "directory of the server's state")
	cmd.PersistentFlags().BoolVar(&f.json, "json", false, "print JSON")
	cmd.AddCommand(f.account(), f.key(), f.token(), f.settings(), f.build(), f.queue(), f.result(), f.status(), f.check(), f.gc())
	return cmd
}

// flags are what all commands share.
type flags struct {
	state string
	json  bool
}

func (a *flags) client() *adminapi.Client { return adminapi.NewClient(a.state) }

// group makes a command that only has commands below it.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, RunE: NeedsCommand}
	cmd.AddCommand(commands...)
	return cmd
}

// print writes v as JSON if that was asked for, else what text writes.
func (a *flags) print(cmd *cobra.Command, v any, text func(w io.Writer)) error {
	out := cmd.OutOrStdout()
	if a.json {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	text(w)
	return w.Flush()
}

// accountNames completes arguments that are names of accounts, up to most of them.
func (a *flags) accountNames(most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
		if len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		list, err := a.client().Accounts(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		for _, acc := range list {
			names = append(names, acc.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// completing gives a command what completes its arguments.
func completing(cmd *cobra.Command, f cobra.CompletionFunc) *cobra.Command {
	cmd.ValidArgsFunction = f
	return cmd
}

// A UsageError is a command line that cannot be understood.
type UsageError struct{ Err error }

func (e UsageError) Error() string { return e.Err.Error() }

// Unwrap returns what is wrong with it.
func (e UsageError) Unwrap() error { return e.Err }

// NeedsCommand is what runs in a command that only has commands below it.
func NeedsCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	return UsageError{fmt.Errorf("%s has no command %q", cmd.CommandPath(), args[0])}
}

// ExactArgs wants as many arguments as there are names.
func ExactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return UsageError{fmt.Errorf("%s takes %s", cmd.CommandPath(), cmp.Or(strings.Join(names, " "), "no arguments"))}
		}
		return nil
	}
}

// ask makes a command that asks the server for a T and prints it: as JSON, or as
// text does.
func ask[T any](a *flags, use, short string, args cobra.PositionalArgs,
	get func(ctx context.Context, args []string) (T, error), text func(w io.Writer, v T)) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
		v, err := get(cmd.Context(), args)
		if err != nil {
			return err
		}
		return a.print(cmd, v, func(w io.Writer) { text(w, v) })
	}}
}

// A done is the answer of a command that has nothing else to tell.
type done struct {
	Removed string `json:"removed"`
}

func printDone(w io.Writer, d done) { fmt.Fprintln(w, "removed", d.Removed) }
