package admincli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"nbd/server/adminapi"
)

func (a *flags) key() *cobra.Command {
	return group("key", "SSH keys of accounts: add, list, remove", a.keyAdd(), a.keyList(), a.keyRemove())
}

func (a *flags) keyAdd() *cobra.Command {
	var permissions []string
	cmd := ask(a, "add ACCOUNT FILE", "Let a key into an account", ExactArgs("ACCOUNT", "FILE"),
		func(ctx context.Context, args []string) ([]adminapi.KeyInfo, error) {
			keys, err := adminapi.ReadKeyFiles(args[1:])
			if err != nil {
				return nil, err
			}
			return a.client().AddKeys(ctx, adminapi.NewKeys{Account: args[0], Keys: keys, Permissions: permissions})
		}, printKeys)
	permissionsFlag(cmd, &permissions)
	return cmd
}

func printKeys(w io.Writer, list []adminapi.KeyInfo) {
	for _, k := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", k.Account, k.Fingerprint, k.Type, strings.Join(k.Permissions, ","), k.Comment)
	}
}

func (a *flags) keyList() *cobra.Command {
	return ask(a, "list [ACCOUNT]", "List keys", cobra.MaximumNArgs(1),
		func(ctx context.Context, args []string) ([]adminapi.KeyInfo, error) {
			return a.client().Keys(ctx, strings.Join(args, ""))
		}, printKeys)
}

func (a *flags) keyRemove() *cobra.Command {
	return ask(a, "remove FINGERPRINT", "Shut a key out", ExactArgs("FINGERPRINT"),
		func(ctx context.Context, args []string) (done, error) {
			return done{args[0]}, a.client().RemoveKey(ctx, args[0])
		}, printDone)
}
