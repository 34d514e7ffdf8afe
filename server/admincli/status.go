package admincli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"nbd/server/adminapi"
	"nbd/store"
)

func (a *flags) status() *cobra.Command {
	return ask(a, "status", "Tell how the server does", ExactArgs(),
		func(ctx context.Context, _ []string) (adminapi.Status, error) { return a.client().Status(ctx) },
		func(w io.Writer, s adminapi.Status) { s.Print(w) })
}

func (a *flags) gc() *cobra.Command {
	return ask(a, "gc", "Remove now the bytes that no account has any more, as the server does each hour", ExactArgs(),
		func(ctx context.Context, _ []string) (adminapi.Freed, error) { return a.client().GC(ctx) },
		func(w io.Writer, f adminapi.Freed) { fmt.Fprintf(w, "freed %d MiB\n", f.Bytes>>20) })
}

func (a *flags) check() *cobra.Command {
	var readData bool
	var report store.Report
	cmd := ask(a, "check", "Prove the store: that all is there, and with --read-data that it is right", ExactArgs(),
		func(ctx context.Context, _ []string) (r store.Report, err error) {
			report, err = a.client().Check(ctx, readData)
			return report, err
		},
		func(w io.Writer, r store.Report) {
			fmt.Fprintf(w, "%d accounts, %d paths, %d NARs, %d MiB\n", r.Accounts, r.Paths, r.Blobs, r.Bytes>>20)
			for _, p := range r.Problems {
				fmt.Fprintln(w, p)
			}
		})
	cmd.PostRunE = func(*cobra.Command, []string) error {
		if !report.OK() {
			return fmt.Errorf("the store has %d faults", len(report.Problems)+report.More)
		}
		return nil
	}
	cmd.Flags().BoolVar(&readData, "read-data", false, "read and hash every byte")
	return cmd
}
