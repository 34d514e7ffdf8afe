package admincli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nbd/server/adminapi"
)

func (a *flags) build() *cobra.Command {
	return group("build", "Builds of all accounts: list, show, log, cancel",
		a.buildList(), completing(a.buildShow(), a.buildIDs()), completing(a.buildLog(), a.buildIDs()), completing(a.buildCancel(), a.buildIDs("pending", "running")))
}

func (a *flags) buildList() *cobra.Command {
	var f adminapi.BuildFilter
	cmd := ask(a, "list", "List builds, the newest first", ExactArgs(),
		func(ctx context.Context, _ []string) ([]adminapi.Build, error) { return a.client().Builds(ctx, f) },
		func(w io.Writer, list []adminapi.Build) {
			for _, b := range list {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%.1f s\t%d CPU s\t%s\n", b.ID, b.Account, b.Created.Local().Format(time.DateTime),
					b.Status, b.Duration, b.CPUSeconds, strings.TrimPrefix(b.Derivation, "/nix/store/"))
			}
		})
	cmd.Flags().StringVar(&f.Account, "account", "", "those of one account")
	cmd.Flags().StringSliceVar(&f.Status, "status", nil, "those with one of these statuses; client_error: those that were refused, too")
	cmd.Flags().StringSliceVar(&f.Tags, "tags", nil, "those with all of these tags, NAME:VALUE")
	cmd.Flags().BoolVar(&f.Reused, "reused", false, "requests that were answered or refused without a run, too")
	cmd.Flags().IntVar(&f.Limit, "limit", 50, "at most so many")
	if err := cmd.RegisterFlagCompletionFunc("account", a.accountNames(1<<10)); err != nil {
		panic(err) // there is no such flag
	}
	return cmd
}

func (a *flags) buildShow() *cobra.Command {
	return ask(a, "show ID", "Show a build, and why it was answered as it was", ExactArgs("ID"),
		func(ctx context.Context, args []string) (b adminapi.Build, err error) {
			id, err := buildID(args[0])
			if err != nil {
				return b, err
			}
			return a.client().Build(ctx, id)
		},
		func(w io.Writer, b adminapi.Build) {
			fmt.Fprintf(w, "build\t%d of %s\n", b.ID, b.Account)
			fmt.Fprintf(w, "derivation\t%s\nsystem\t%s\n", b.Derivation, b.System)
			fmt.Fprintf(w, "status\t%s %s\n", b.Status, b.Message)
			fmt.Fprintf(w, "created\t%s\n", b.Created.Local().Format(time.DateTime))
			fmt.Fprintf(w, "took\t%.1f s, %d s of CPU time on %d CPUs, %d MiB of memory\n", b.Duration, b.CPUSeconds, b.CPUs, b.PeakMemoryKiB>>10)
			for _, row := range b.Network.Rows() {
				fmt.Fprintf(w, "%s\t%s\n", row[0], row[1])
			}
			for _, d := range b.Decisions {
				mark := ""
				if d.Taken {
					mark = ", which decided"
				}
				fmt.Fprintf(w, "%s\t%s%s\n", d.Check, d.Reason, mark)
			}
		})
}

func (a *flags) buildLog() *cobra.Command {
	return &cobra.Command{Use: "log ID", Short: "Print the log of a build, byte for byte, live while it runs", Args: ExactArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := buildID(args[0])
			if err != nil {
				return err
			}
			return a.client().BuildLog(cmd.Context(), id, cmd.OutOrStdout())
		}}
}

// A cancelled is the answer of build cancel.
type cancelled struct {
	Cancelled uint64 `json:"cancelled"`
}

func (a *flags) buildCancel() *cobra.Command {
	return ask(a, "cancel ID", "End a build that waits or runs; others that wait for the same run are not disturbed", ExactArgs("ID"),
		func(ctx context.Context, args []string) (c cancelled, err error) {
			id, err := buildID(args[0])
			if err != nil {
				return c, err
			}
			return cancelled{id}, a.client().CancelBuild(ctx, id)
		},
		func(w io.Writer, c cancelled) { fmt.Fprintln(w, "cancelled build", c.Cancelled) })
}

// buildID reads the id of a build.
func buildID(text string) (uint64, error) {
	id, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, UsageError{fmt.Errorf("%q is not the id of a build, which is a number", text)}
	}
	return id, nil
}

// buildIDs completes the id of a build with one of the statuses, of any if there
// are none.
func (a *flags) buildIDs(status ...string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) (ids []string, _ cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		list, err := a.client().Builds(cmd.Context(), adminapi.BuildFilter{Status: status})
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		for _, b := range list {
			ids = append(ids, fmt.Sprintf("%d\t%s of %s", b.ID, b.Status, b.Account))
		}
		return ids, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

func (a *flags) queue() *cobra.Command {
	return ask(a, "queue", "Show what waits, and for what", ExactArgs(),
		func(ctx context.Context, _ []string) (adminapi.QueueState, error) { return a.client().Queue(ctx) },
		func(w io.Writer, q adminapi.QueueState) {
			fmt.Fprintf(w, "%d running, %d waiting; free: %d guests, %d MiB, %d CPUs\n", q.Running, q.Waiting, q.Free.Guests, q.Free.MemoryMiB, q.Free.CPUs)
			for _, b := range q.Builds {
				fmt.Fprintf(w, "build %d\t%s\t%d ahead\twaits for %s\tsince %s\n", b.ID, b.Account, b.Ahead, b.Lacks, b.Since.Local().Format(time.DateTime))
			}
		})
}

func (a *flags) result() *cobra.Command {
	return group("result", "Stored results: revoke",
		completing(ask(a, "revoke KEY|BUILD", "Take a result out, so that nobody is answered with it any more", ExactArgs("KEY|BUILD"),
			func(ctx context.Context, args []string) (adminapi.Revoked, error) {
				return a.client().Revoke(ctx, args[0])
			},
			func(w io.Writer, r adminapi.Revoked) { fmt.Fprintf(w, "revoked %d records of %s\n", r.Records, r.Key) }), a.buildIDs()))
}
