"""UR4Rec: preference texts of users and descriptions of items beside a recommender of item ids."""
