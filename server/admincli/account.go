package admincli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"nbd/server/adminapi"
)

func (a *flags) account() *cobra.Command {
	return group("account", "Accounts: add, list, remove, link, unlink", a.accountAdd(), a.accountList(),
		completing(a.accountRemove(), a.accountNames(1)), completing(a.link(), a.accountNames(2)), completing(a.unlink(), a.accountNames(2)))
}

func (a *flags) accountAdd() *cobra.Command {
	var files []string
	cmd := ask(a, "add NAME --ssh-key FILE", "Make an account and let its keys in", ExactArgs("NAME"),
		func(ctx context.Context, args []string) (acc adminapi.AccountInfo, err error) {
			keys, err := adminapi.ReadKeyFiles(files)
			if err != nil {
				return acc, err
			}
			return a.client().AddAccount(ctx, adminapi.NewKeys{Account: args[0], Keys: keys})
		},
		func(w io.Writer, acc adminapi.AccountInfo) {
			fmt.Fprintf(w, "account %s\nsigns with %s\n", acc.Name, acc.PublicKey)
			for _, k := range acc.Keys {
				fmt.Fprintf(w, "key %s %s\n", k.Fingerprint, k.Comment)
			}
		})
	cmd.Flags().StringArrayVar(&files, "ssh-key", nil, "file with public SSH keys, - for standard input; may be repeated")
	return cmd
}

func (a *flags) accountList() *cobra.Command {
	return ask(a, "list", "List accounts", ExactArgs(),
		func(ctx context.Context, _ []string) ([]adminapi.AccountInfo, error) { return a.client().Accounts(ctx) },
		func(w io.Writer, list []adminapi.AccountInfo) {
			for _, acc := range list {
				fmt.Fprintf(w, "%s\t%d keys\t%s\n", acc.Name, len(acc.Keys), acc.PublicKey)
			}
		})
}

func (a *flags) accountRemove() *cobra.Command {
	return ask(a, "remove NAME", "Remove an account with its keys and all it has in the store", ExactArgs("NAME"),
		func(ctx context.Context, args []string) (done, error) {
			return done{args[0]}, a.client().RemoveAccount(ctx, args[0])
		}, printDone)
}
